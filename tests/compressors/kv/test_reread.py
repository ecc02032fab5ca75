"""Passages whose first tokens are read again: the same as one masked pass, within the budget, kept by files and stores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.adapters.store import Encoding
from nutgraf.adapters.store.codec import round_trip
from nutgraf.compressors import CompressedPassage

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
OTHER = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: when?\nAnswer:"
SEPARATOR = "\n\n"
FIRST = 5


def masked_pass(reader: Reader, texts: list[str], first: int) -> torch.Tensor:
    """Last logits of one pass: a passage as it was indexed, seen from its token ``first`` on, and its first tokens again.

    The indexed copy sees a BOS of its own and itself. The tokens that are read again see everything in front of them.
    """
    bos = list(reader.bos_ids)
    ids, positions, owner, seen = [], [], [], []  # seen: by the prompt's own tokens, whose owner is 0

    def add(new: list[int], start: int, who: int, visible: list[bool]) -> None:
        ids.extend(new)
        positions.extend(range(start, start + len(new)))
        owner.extend([who] * len(new))
        seen.extend(visible)

    add(bos, 0, 0, [True] * len(bos))
    at = len(bos)
    for number, text in enumerate(texts, 1):
        tokens = reader.tokenize(text)
        add(bos, at - len(bos), number, [False] * len(bos))
        add(tokens, at, number, [False] * first + [True] * (len(tokens) - first))
        add(tokens[:first], at, 0, [True] * first)
        after = reader.tokenize(SEPARATOR if number < len(texts) else QUESTION)
        add(after, at + len(tokens), 0, [True] * len(after))
        at += len(tokens) + len(after)
    who, visible, place = torch.tensor(owner), torch.tensor(seen), torch.tensor(positions)
    n = len(ids)
    own = (who[:, None] == who) & torch.ones(n, n, dtype=torch.bool).tril()
    across = (who[:, None] == 0) & visible & (place[:, None] > place)
    # What is read again stands at the places of its own indexed copy, which it must not see.
    mask = torch.zeros(n, n).masked_fill(~(own | across), torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = reader.model(
            inputs_embeds=reader.embed(torch.tensor([ids])), attention_mask=mask[None, None], position_ids=place[None]
        )
    return out.logits[0, -1]


def last_logits(reader: Reader, prompt: list) -> torch.Tensor:
    return reader.target_logits([prompt], [[1]])[0][-1]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_first_tokens_are_read_after_the_passages_in_front(zoo, name):
    reader = zoo.reader(name)
    compressor = load_compressor("kv-match", reader=reader, reread=FIRST, probes=2)
    one, two = compressor.compress([TEXT, OTHER], ratio=1)
    assert one.first == tuple(reader.tokenize(TEXT)[:FIRST])
    assert one.places == one.source_tokens == one.slots
    got = last_logits(reader, [one, SEPARATOR, two, QUESTION])
    assert close(got, masked_pass(reader, [TEXT, OTHER], FIRST))
    # A passage at the start of a prompt is read as text is, whatever is read again.
    assert close(last_logits(reader, [one, QUESTION]), last_logits(reader, [TEXT + QUESTION]))
    prompts = [[one, SEPARATOR, two, QUESTION], [TEXT, QUESTION], [two, QUESTION]]
    together = reader.target_logits(prompts, [[1]] * 3)
    assert all(close(logits[-1], last_logits(reader, prompt)) for logits, prompt in zip(together, prompts))
    assert reader.generate(prompts, 4) == [reader.generate([prompt], 4)[0] for prompt in prompts]


def test_the_ratio_is_that_of_the_tokens_behind_them(zoo):
    reader = zoo.reader("llama")
    compressor = load_compressor("kv-match", reader=reader, reread=FIRST, probes=2)
    texts = [TEXT * 3, OTHER, reader.decode(reader.tokenize(TEXT)[: FIRST + 1]), "It.", ""]
    for ratio in (1.0, 2.5, 16.0):
        for text, passage in zip(texts, compressor.compress(texts, ratio=ratio)):
            ids = reader.tokenize(text)
            assert passage.first == (tuple(ids[:FIRST]) if len(ids) > FIRST else ())
            rest = len(ids) - len(passage.first)
            assert passage.span == (len(reader.bos_ids) + len(passage.first), rest)
            pairs = int(passage.counts.sum()) / passage.counts.numel()
            assert pairs <= max(1.0, rest / ratio) + 1e-6
            assert passage.places == passage.source_tokens == len(ids)
            assert not ids or passage.ratio == pytest.approx(
                len(ids) / (pairs + len(passage.first))
            )  # they count as slots


def test_at_several_ratios_and_beside_what_must_stay(zoo):
    reader = zoo.reader("llama")
    compressor = load_compressor("kv-match", reader=reader, reread=FIRST, probes=2, keep=["1648"])
    texts = [TEXT * 2, TEXT + OTHER]
    places = reader.tokenize_with_offsets(TEXT)[1]
    digits = [i for i, (a, b) in enumerate(places) if a < TEXT.index("1648") + 4 and b > TEXT.index("1648")]
    for found, ratio in zip(compressor.compress_at(texts, [1.5, 2.0]), [1.5, 2.0]):
        for got, want in zip(found, compressor.compress(texts, ratio=ratio)):
            assert got.to_bytes() == want.to_bytes()
            assert all(int((got.positions == len(reader.bos_ids) + i).sum()) == got.counts.numel() for i in digits)
    with pytest.raises(ValueError, match="What must stay"):
        compressor.compress(texts[:1], ratio=1000.0)


def test_files_and_stores_keep_them(zoo, tmp_path):
    reader = zoo.reader("llama")
    [passage] = load_compressor("kv-match", reader=reader, reread=FIRST, probes=2).compress([TEXT], ratio=2)
    passage.save(tmp_path / "passage.safetensors")
    want = last_logits(reader, [passage, QUESTION])
    loaded = CompressedPassage.load(tmp_path / "passage.safetensors")
    stored, _ = round_trip(passage, Encoding(dtype="float32"))
    for found in (loaded, stored):
        assert found.first == passage.first
        assert found.source_tokens == passage.source_tokens
        assert torch.equal(last_logits(reader, [found, QUESTION]), want)


def test_wrong_tokens_are_refused(zoo):
    reader = zoo.reader("llama")
    compressor = load_compressor("kv-match", reader=reader, reread=FIRST, probes=2)
    [passage] = compressor.compress([TEXT], ratio=2)
    with pytest.raises(ValueError, match="token ids of at least 0, got -1"):
        dataclasses.replace(passage, first=(3, -1))
    with pytest.raises(ValueError, match="needs counts"):
        dataclasses.replace(reader.identity(TEXT), first=(3,))
    with pytest.raises(ValueError, match="Token ids must lie in"):
        reader.generate([[dataclasses.replace(passage, first=(10**9,)), QUESTION]])
    with pytest.raises(ValueError, match="reread must be an integer of at least 0"):
        load_compressor("kv-match", reader=reader, reread=-1)
    plain = load_compressor("kv-match", reader=reader, probes=2)
    assert plain.fingerprint == load_compressor("kv-match", reader=reader, probes=2, reread=0).fingerprint
    assert plain.fingerprint != compressor.fingerprint
