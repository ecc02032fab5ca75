"""Ragged KV passages, read through `transformers.AttentionInterface`, against one masked pass computed otherwise."""

from __future__ import annotations

import concurrent.futures
from dataclasses import replace

import pytest
import torch
from nutgraf import CompressedPassage, Reader
from nutgraf.compressors.kv.encode import cached_layers
from nutgraf.compressors.reader.attention import attending
from nutgraf.compressors.reader.kv import KVPlacement
from nutgraf.compressors.reader.tokenization import TokenIds
from oracles.ragged_pass import one_pass

SHORT = "It was signed in 1648."
LONG = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers."
QUESTION = "\nQuestion: when?\nAnswer:"
MOVABLE = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "mixtral"]


def ragged(reader: Reader, text: str, keep: float = 1.0, start: int = 0) -> CompressedPassage:
    """A passage read alone, of which each head keeps its own random pairs, with a random bias; or all, without."""
    ids = reader.tokenize(text)
    whole = torch.tensor([ids])
    positions = torch.arange(len(ids)) + start
    with torch.no_grad():
        layers = cached_layers(reader.model.get_decoder(), reader.embed(whole), torch.ones_like(whole), positions[None])
    heads = layers[0][0].shape[1]
    kept = torch.rand(len(layers), heads, len(ids)) < keep
    keys, values = (torch.stack([layer[i][0] for layer in layers])[kept] for i in (0, 1))
    at = positions.expand_as(kept)[kept]
    bias = torch.randn(len(keys)) if keep < 1 else None
    return CompressedPassage(
        "kv",
        len(ids),
        "test",
        reader.fingerprint,
        keys=(keys,),
        values=(values,),
        positions=at.int(),
        counts=kept.sum(-1),
        bias=bias,
        span=(start, len(ids)),
    )


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_ragged_passages_equal_one_masked_pass(zoo, name, keep, implementation, monkeypatch):
    if (name, implementation) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 caps its scores, which sdpa cannot do")
    reader = zoo.reader(name, attn_implementation=implementation)
    first, second = ragged(reader, LONG, keep), ragged(reader, SHORT, keep, start=9)
    prompt = ["Read this: ", first, " and then this: ", second, QUESTION]
    pieces = [("Read this: ", None), (LONG, first), (" and then this: ", None), (SHORT, second), (QUESTION, None)]
    plain = reader.target_logits([SHORT], [" x"])[0]
    want = one_pass(reader, pieces, monkeypatch)
    assert close(reader.target_logits([prompt], [" x"])[0][0], want)
    # in a batch with text, soft slots and dense keys and values; when generating, step by step, streamed and with beams
    dense = replace_dense(first)
    mixed = ["A ", second, reader.identity(SHORT), dense, " b ", first, QUESTION]
    batch = [SHORT, prompt, [second, QUESTION], [dense, QUESTION], mixed]
    together = reader.target_logits(batch, [" x"] * 5)
    assert close(together[1][0], want)
    for alone, row in zip((reader.target_logits([p], [" x"])[0] for p in batch), together):
        assert close(alone, row)
    assert reader.generate(batch, 6) == [reader.generate([p], 6)[0] for p in batch]
    answer: list[int] = []
    for _ in range(4):
        answer.append(int(reader.target_logits([prompt], [[*answer, 5]])[0][-1].argmax()))
    assert reader.generate([prompt], 4, eos_token_id=[599])[0] == reader.decode(answer)
    assert "".join(reader.stream(prompt, 6)) == reader.generate([prompt], 6)[0]
    assert reader.generate([prompt, [second, QUESTION]], 4, num_beams=2)
    # and without KV passages the model is as it was
    assert reader.model.config._attn_implementation == implementation
    assert torch.equal(reader.target_logits([SHORT], [" x"])[0], plain)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_one_token_follows_ragged_slots(zoo, name, monkeypatch):
    """A prompt that is a passage and one token, and an answer of one token; alone and in a batch."""
    reader = zoo.reader(name)
    passage = ragged(reader, LONG, 0.5)
    (first,) = reader.tokenize("?")[:1]
    prompt = [TokenIds(()), passage, TokenIds((first,))]
    monkeypatch.setattr(type(reader), "bos_ids", property(lambda self: []))
    want = one_pass(reader, [(LONG, passage), (reader.decode([first]), None)], monkeypatch)
    assert close(reader.target_logits([prompt], [[5]])[0][0], want)
    answer = reader.decode([int(want.argmax())])
    options = {"eos_token_id": [599]}
    assert reader.generate([prompt], 1, **options) == [answer]
    assert "".join(reader.stream(prompt, 1, **options)) == answer
    assert reader.generate([[SHORT, QUESTION], prompt, ["a"]], 1, **options)[1] == answer
    with pytest.raises(ValueError, match="must not end with a KV passage"):
        reader.generate([[passage, ""]], 1)  # an empty question: nothing asks for an answer


def replace_dense(passage: CompressedPassage) -> CompressedPassage:
    """The passage with the same pairs in every head: those that its first head keeps."""
    layers, heads = passage.counts.shape
    n = int(passage.counts.min())
    picked = [t.split(passage.counts.flatten().tolist()) for t in (passage.keys[0], passage.values[0])]
    keys, values = (
        tuple(torch.stack([part[:n] for part in parts[i * heads : (i + 1) * heads]]) for i in range(layers))
        for parts in picked
    )
    at = passage.positions[:n].long()
    return replace(passage, keys=keys, values=values, positions=at, counts=None, bias=None, span=None)


def test_gradients_reach_pairs_and_bias(zoo):
    reader = zoo.reader("llama")
    passage = ragged(reader, LONG, 0.5)
    moving = replace(
        passage, keys=(passage.keys[0].requires_grad_(),), bias=passage.bias.requires_grad_(), info={"grad": True}
    )
    reader.target_logits([["a ", moving, QUESTION]], [" x"])[0].logsumexp(-1).sum().backward()
    assert moving.keys[0].grad.abs().amin(-1).min() > 0
    assert moving.bias.grad.abs().min() > 0


@pytest.mark.slow
def test_readers_whose_keys_or_attention_do_not_allow_it_say_so(zoo):
    for name, message in (("gpt2", "cannot be read at position"), ("opt", "cannot be read at position")):
        reader = zoo.reader(name)
        with pytest.raises(ValueError, match=message):
            reader.generate([["A ", ragged(reader, SHORT), QUESTION]], 1)
    falcon = zoo.reader("falcon")
    with pytest.raises(ValueError, match=r"must go through transformers\.AttentionInterface"):
        falcon.generate([[ragged(falcon, SHORT), QUESTION]], 1)
    llama = zoo.reader("llama")
    passage = ragged(llama, SHORT)
    for changes, message in (
        ({"num_hidden_layers": 2}, "has 3 layers, the reader 2"),
        ({"num_key_value_heads": 4}, "has 2 heads, the reader 4"),
    ):
        other = zoo.reader("llama", **changes)
        with pytest.raises(ValueError, match=message):
            other.generate([[replace(passage, reader=other.fingerprint), QUESTION]], 1)
    flex = zoo.reader("llama", attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' reads no KV passages"):
        flex.generate([[ragged(flex, SHORT), QUESTION]], 1)
    narrow = zoo.reader("mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding window spans 16"):
        narrow.generate([[ragged(narrow, LONG), QUESTION]], 1)


def test_other_threads_read_text_with_the_models_own_attention(zoo):
    reader = zoo.reader("llama")
    passage = ragged(reader, LONG, 0.5)
    texts = [SHORT, LONG]
    plain = reader.target_logits(texts, [" x"] * 2)
    kv = reader.target_logits([[passage, QUESTION]], [" x"])[0]

    def work(i: int) -> bool:
        if i % 2:
            return torch.equal(reader.target_logits([[passage, QUESTION]], [" x"])[0], kv)
        return all(map(torch.equal, reader.target_logits(texts, [" x"] * 2), plain))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))
    assert reader.model.config._attn_implementation == "sdpa"


def test_a_failed_read_leaves_the_model_as_it_was(zoo):
    reader = zoo.reader("llama")
    before = reader.fingerprint
    with pytest.raises(RuntimeError, match="stop"), attending(reader.model, object()):
        raise RuntimeError("stop")
    assert reader.model.config._attn_implementation == "sdpa"
    with attending(reader.model, object()):
        assert zoo_fingerprint(reader) == before


def zoo_fingerprint(reader: Reader) -> str:
    return Reader(reader.model, reader.tokenizer).fingerprint


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "opt", "gpt2"])
def test_how_keys_move_is_found_in_bfloat16_too(zoo, name):
    layers = {"opt": 12, "gpt2": 12}.get(name, 24)  # over which rounding grows
    change = {"n_layer": layers} if name == "gpt2" else {"num_hidden_layers": layers}
    if name == "gemma3_text":
        change["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    model = zoo.model(name, **change)
    kinds = KVPlacement(model).kinds
    assert set(kinds) == {"fixed" if name in ("opt", "gpt2") else "rotary"}
    assert KVPlacement(model.to(torch.bfloat16)).kinds == kinds
