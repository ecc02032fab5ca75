"""What every compressor must do, for every registered method on tiny random models of several architectures."""

from __future__ import annotations

import concurrent.futures
import functools
import random

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage, Reader, load_compressor
from nutgraf.compressors import COMPRESSORS, CheckpointError, Compressor, ReaderMismatchError, SoftCompressor
from nutgraf.compressors.encoders.embedder import load_embedder
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "gpt2",
    "falcon",
    "olmo2",
    "mixtral",
]
# A new method needs one entry: small settings under which every one of its parts is at work.
SETTINGS: dict[str, dict] = {
    "full-text": {"reader_r": 4},
    "xrag": {"shard_tokens": 24},
    "gist": {"n_gist": 6, "r": 4, "shared_embedding": False},
    "500x": {"num_mem": 6, "ratio": 4.0, "r": 4},
    "icae": {"mem_size": 6, "ratio": 4.0, "r": 4, "projector": "linear"},
    "autocompressor": {"summary_length": 6, "ratio": 4.0, "r": 4},
    "mean-pool": {"weighting": "learned", "r": 4, "chunk_tokens": 40},
    "pisco": {
        "ratio": 4.0,
        "segment_tokens": 40,
        "memory_tokens": 12,
        "r": 4,
        "connector": "mlp",
        "connector_width": 16,
    },
    "selective-context": {"unit": "word", "keep": ["Nobel"]},
    "llmlingua": {"keep": ["Nobel"]},
    "longllmlingua": {"question": "Who won a prize?"},
    "llmlingua2": {"r": 2},
    "provence": {"r": 2},
    "exit": {},
    "token-elimination": {},
    "recomp": {"r": 2},
    "filco": {"r": 2},
    "semantic": {"topic_words": 8},
    "prompt-saw": {},
    "pcrl": {"r": 2},
    "nano-capsulator": {"r": 2, "verify": False},
    "salient-pool": {"r": 2},
    "kv-match": {"probes": 4},
    "icformer": {"digests": 6, "layers": 2, "ratio": 4.0},
    "extensible": {"layers": 2, "chunk_tokens": 40},
    "readonce": {"ratio": 4.0, "chunk_tokens": 40},
    "uniicl": {"ratio": 4.0, "segment_tokens": 40},
    "gist-coco": {"passage_gists": 6, "question_gists": 3, "ratio": 4.0, "r": 4},
    "rmt": {"memory_tokens": 6, "segment_tokens": 12, "ratio": 4.0, "r": 4},
    "qgc": {"layers": 1, "ratio": 4.0, "segment_tokens": 40},
    "compllm": {"r": 4},
    "rcc": {"ratio": 4.0, "segment_tokens": 40, "r": 4},
    "beacon": {"segment_tokens": 24, "r": 4},
    "dodo": {"segment_tokens": 40, "scorer_layers": 2, "r": 4},
    "nugget": {"segment_tokens": 40, "scorer_layers": 2, "r": 4},
    "hd-gist": {"segment_tokens": 40, "ratio": 3.0, "r": 4},
    "compressive": {"segment_tokens": 40},
    "restore-kv": {"segment_tokens": 40, "restore_tokens": 2, "probes": 4, "r": 4},
    "lclm": {"segment_tokens": 40, "adapter_width": 16, "r": 4, "tune_reader": True, "reader_r": 3},
    "kv-distill": {"segment_tokens": 40, "scorer_layers": 2, "first_tokens": 2, "r": 4},
    "scc": {"inner": "icae", "ratio": 2.0, "inner_settings": {"mem_size": 6, "r": 4, "projector": "linear"}},
    "pe-rank": {"shard_tokens": 24, "reader_r": 3},
    "pc": {"steps": 2, "probes": 1},
    "arc-encoder": {"segment_tokens": 40, "dropped_layers": 1, "bridge_width": 16, "r": 4},
}
# Options that change how a method compresses, as `method:option`, tried on some of the architectures.
_ICAE = {"mem_size": 6, "r": 4, "projector": "linear"}
OPTIONS: dict[str, dict] = {
    "icae:query": {**_ICAE, "ratio": 4.0, "query_aware": True},
    "500x:query": {**SETTINGS["500x"], "query_aware": True},
    "500x:residual": {**SETTINGS["500x"], "residual": True},
    "gist:query": {**SETTINGS["gist"], "positions": "spread", "query_aware": True},
    "mean-pool:query": {**SETTINGS["mean-pool"], "query_aware": True},
    "icae:reader": {**_ICAE, "ratio": 4.0, "tune_reader": True, "reader_r": 3},
    "500x:reader": {**SETTINGS["500x"], "tune_reader": True, "reader_r": 3},
    "mean-pool:reader": {**SETTINGS["mean-pool"], "tune_reader": True, "reader_r": 3},
    "xrag:reader": {**SETTINGS["xrag"], "tune_reader": True, "reader_r": 3},
    "pisco:query": {**SETTINGS["pisco"], "query_aware": True},
    "pcrl:query": {"r": 2, "query_aware": True},
    "nano-capsulator:query": {"r": 2, "verify": False, "query_aware": True},
    "provence:sentence": {"r": 2, "unit": "sentence", "keep": ["Nobel"]},
    "prompt-saw:plain": {"query_aware": False},
    "hd-gist:query": {"segment_tokens": 40, "ratio": 3.0, "r": 4, "query_aware": True, "adapt_reader": False},
    "kv-match:query": {"score": "snapkv", "budget": "per-layer", "repair": "bias"},
    "kv-match:surrogate": {"score": "surrogate", "repair": "none"},
    "kv-match:reread": {"probes": 4, "reread": 3, "repair": "none"},
}
METHODS = set(SETTINGS)
SETTINGS |= OPTIONS
OPTION_ARCHITECTURES = ("llama", "gemma3_text", "gpt_neox")
QUESTION = "Who won two prizes?"
UNTRAINED = ("selective-context", "llmlingua", "longllmlingua", "kv-match", "kv-match:query", "kv-match:reread", "pc")
UNTRAINED += ("exit", "token-elimination", "semantic", "prompt-saw", "prompt-saw:plain")
EMBEDDING = ("xrag", "pe-rank", "semantic", "prompt-saw")  # methods that take an embedder
WRITING = ("nano-capsulator", "nano-capsulator:query")  # a text that they write may be empty, and has no spans
SOFT = [name for name in sorted(SETTINGS) if issubclass(COMPRESSORS[name.partition(":")[0]], SoftCompressor)]
# Readers that a method cannot work with, and what it says when it is built for one.
NO_PLACES = ("500x", "gist", "kv-match", "rcc", "beacon", "dodo", "kv-distill", "compressive", "restore-kv", "hd-gist")
REFUSED = {(method, name): "mixes positions into its keys" for method in NO_PLACES for name in ("gpt2", "opt")}
REFUSED |= {("arc-encoder", name): "changes embeddings before its first layer" for name in ("gpt2", "opt")}
REFUSED |= {
    (method, "falcon"): r"must go through transformers\.AttentionInterface"
    for method in ("kv-match", "token-elimination", "dodo", "kv-distill", "compressive", "restore-kv")
}
TEXTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "",
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. " * 3,
    " \n\t ",
    "a",
    "日本語 🦊👩‍👩‍👧 עברית é\ud800 </s><|user|>",
]


@functools.cache
def embedder():
    return load_embedder("all-MiniLM-L6-v2", "cpu")


def build(method: str, reader: Reader) -> Compressor:
    torch.manual_seed(0)
    cls = COMPRESSORS[method.partition(":")[0]]
    extra = {"embedder": embedder()} if method.startswith(EMBEDDING) else {}
    compressor = cls(cls.config_class.from_dict(SETTINGS[method]), reader, **extra)
    with torch.no_grad():  # as after some training: no matrix is zero
        for p in compressor.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return compressor.eval()


def load(folder, reader: Reader) -> Compressor:
    about = (folder / "config.json").read_text()
    extra = {"embedder": embedder()} if any(f'"method": "{name}"' in about for name in EMBEDDING) else {}
    return load_compressor(folder, reader, **extra)


@functools.cache
def pair(method: str, architecture: str) -> tuple[Compressor, list[CompressedPassage]]:
    compressor = build(method, reader_of(architecture))
    return compressor, compress(compressor, TEXTS)


def compress(compressor: Compressor, texts: list[str], **options) -> list[CompressedPassage]:
    return compressor.compress(texts, query=QUESTION if compressor.query_aware else None, **options)


@functools.cache
def reader_of(architecture: str) -> Reader:
    return zoo.reader(architecture)


def difference(a: CompressedPassage, b: CompressedPassage) -> float:
    assert a.interface == b.interface
    assert a.slots == b.slots
    if a.interface == "text":
        return 0.0 if (a.text, a.spans) == (b.text, b.spans) else float("inf")
    pairs = zip(a.tensors().values(), b.tensors().values())
    return max([float((x - y).abs().max()) for x, y in pairs if x.numel()], default=0.0)


methods = pytest.mark.parametrize("method", sorted(SETTINGS))
PLACES = [(m, a) for m in sorted(METHODS) for a in ARCHITECTURES if (m, a) not in REFUSED]
PLACES += [(m, a) for m in sorted(OPTIONS) for a in OPTION_ARCHITECTURES]


def places(found: list[tuple[str, str]]) -> list:
    """`make check` runs every method on Llama, `make test` on all architectures."""
    quick = [architecture == "llama" and ":" not in method for method, architecture in found]
    return [pytest.param(*place, marks=() if fast else pytest.mark.slow) for place, fast in zip(found, quick)]


everywhere = pytest.mark.parametrize(("method", "architecture"), places(PLACES))


def test_every_registered_method_is_tested():
    ours = {name for name, cls in COMPRESSORS.items() if cls.__module__.startswith("nutgraf.compressors.")}
    assert ours == METHODS, "give the new method an entry in SETTINGS"


@pytest.mark.parametrize(("method", "architecture"), sorted(REFUSED))
def test_a_reader_that_a_method_cannot_work_with_is_refused(method, architecture):
    with pytest.raises(ValueError, match=REFUSED[method, architecture]):
        build(method, reader_of(architecture))


@everywhere
def test_one_for_each_in_order_and_never_longer(method, architecture):
    compressor, found = pair(method, architecture)
    reader = compressor.reader
    assert len(found) == len(TEXTS)
    for text, passage in zip(TEXTS, found):
        assert passage.interface == compressor.interface
        assert passage.source_tokens == len(reader.tokenize(text))
        assert passage.slots <= passage.source_tokens
        assert passage.check() is passage
    assert found[1].slots == 0
    assert found[2].slots > 1 or method in WRITING
    # in reverse order the same passages come out, in reverse order
    backwards = compress(compressor, TEXTS[::-1])[::-1]
    assert max(map(difference, found, backwards)) < 1e-5


@everywhere
def test_batched_equals_one_by_one(method, architecture):
    compressor, found = pair(method, architecture)
    # the fit magnifies float32 rounding of what the reader attends to
    tolerance = 1e-3 if method.startswith("kv-match") else 1e-5
    alone = [compress(compressor, [text])[0] for text in TEXTS]
    assert max(map(difference, found, alone)) < tolerance
    pairs = compress(compressor, TEXTS, batch_size=2)
    assert max(map(difference, found, pairs)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(SETTINGS) - {"pc"}))  # it fits each passage by gradient descent
def test_sixty_four_passages_of_any_length_in_one_call_equal_each_alone(method, zoo):
    reader = zoo.reader("llama")
    reader.model.double()  # in float32 rounding grows over the segments of a long passage, to 1e-3 in a hundred of them
    compressor = build(method, reader).double()
    words = (" ".join(TEXTS[0:3:2])).split()
    lengths = torch.linspace(10, 600, 64).int().tolist()
    texts = []
    for number, length in enumerate(lengths):
        text = " ".join(words[(number + i) % len(words)] for i in range(length))
        texts.append(text[: reader.tokenize_with_offsets(text)[1][length - 1][1]])
    order = random.Random(0).sample(range(64), 64)
    found = compress(compressor, [texts[i] for i in order])
    sizes = [passage.source_tokens for passage in found]
    assert min(sizes) <= 12  # a cut text may be read in other tokens
    assert max(sizes) >= 590
    assert max(difference(compress(compressor, [texts[i]])[0], passage) for i, passage in zip(order, found)) < 1e-5


@everywhere
def test_the_reader_reads_it_and_its_content_matters(method, architecture):
    compressor, found = pair(method, architecture)
    reader = compressor.reader
    question = "\n\nQuestion: who?\nAnswer:"
    first, other, empty = reader.target_logits([[found[i], question] for i in (0, 2, 1)], [" it"] * 3)
    assert torch.isfinite(first).all()
    assert not torch.allclose(first, other, atol=1e-3) or (method in WRITING and not found[0].text)
    assert not torch.allclose(first, empty, atol=1e-3) or (method in WRITING and not found[0].text)


@everywhere
def test_save_and_load_gives_bit_equal_slots(method, architecture, tmp_path):
    compressor, _ = pair(method, architecture)
    compressor.save_pretrained(tmp_path)
    loaded = load(tmp_path, compressor.base_reader)
    assert type(loaded) is type(compressor)
    assert loaded.config == compressor.config
    assert loaded.fingerprint == compressor.fingerprint
    assert not loaded.training
    for a, b in zip(compress(compressor, TEXTS), compress(loaded, TEXTS)):
        assert difference(a, b) == 0
        assert a.compressor == b.compressor
        back = CompressedPassage.from_bytes(a.to_bytes())
        assert difference(a, back) == 0


@pytest.mark.parametrize("method", [m for m in sorted(SETTINGS) if m not in UNTRAINED])
def test_weights_rounded_to_bfloat16_take_half_the_bytes_and_load_as_they_are(method, tmp_path):
    compressor, _ = pair(method, "llama")
    compressor.save_pretrained(tmp_path / "whole")
    compressor.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    loaded = load(tmp_path / "half", compressor.base_reader)
    for name, tensor in loaded.trainable_state().items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor.cpu(), whole[name].bfloat16().to(tensor.dtype)), name
    loaded.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", compressor.base_reader).fingerprint == loaded.fingerprint


@pytest.mark.parametrize("method", SOFT)
def test_no_ratio_is_high_enough_to_lose_a_passage(method):
    compressor, found = pair(method, "llama")
    made = compress(compressor, TEXTS, ratio=1e9)
    assert [bool(p.slots) for p in made] == [bool(p.slots) for p in found]


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in sorted(SETTINGS) if m not in UNTRAINED])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(method, tmp_path):
    compressor, _ = pair(method, "llama")
    compressor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    name = sorted(whole)[0]
    wrong = {
        "missing": {k: v for k, v in whole.items() if k != name},
        "unknown": {**whole, "left.over": torch.zeros(1)},
        "wanted": {**whole, name: torch.zeros(3, 5)},
    }
    for word, state in wrong.items():
        save_file(state, weights)
        with pytest.raises(CheckpointError, match=word) as error:
            load(tmp_path, compressor.base_reader)
        assert ("left.over" if word == "unknown" else name) in str(error.value)
    weights.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path, compressor.base_reader)


@pytest.mark.parametrize("method", SOFT)
def test_another_reader_is_refused(method, tmp_path, zoo):
    compressor, found = pair(method, "llama")
    compressor.save_pretrained(tmp_path)
    other = zoo.reader("llama", seed=7)
    with pytest.raises(ReaderMismatchError, match="made for"):
        load(tmp_path, other)
    with pytest.raises(ReaderMismatchError, match="made for"):
        other.generate([[found[0], " x"]], 1)


@methods
def test_fingerprints_name_reader_and_compressor_and_follow_the_weights(method):
    compressor = build(method, reader_of("llama"))
    passage = compress(compressor, TEXTS[:1])[0]
    assert passage.compressor == compressor.fingerprint
    assert passage.reader == (None if compressor.interface == "text" else compressor.reader.fingerprint)
    seen = {compressor.fingerprint}
    for parameter in compressor.parameters():
        with torch.no_grad():
            parameter.add_(0.01)
        seen.add(compressor.fingerprint)
    assert len(seen) == 1 + len(list(compressor.parameters()))


@pytest.mark.slow
@methods
def test_eight_threads_get_what_one_gets(method):
    compressor, found = pair(method, "llama")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: compress(compressor, TEXTS), range(8)))
    for result in results:
        assert max(map(difference, found, result)) < 1e-6
    assert compress(compressor, []) == []


@pytest.mark.slow
@methods
def test_compressing_beside_reading_changes_neither(method):
    compressor, found = pair(method, "llama")
    reader = compressor.reader
    alone = reader.target_logits([TEXTS[0]], [" it"])[0]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(compress, compressor, TEXTS) for _ in range(2)]
        read = [pool.submit(reader.target_logits, [TEXTS[0]], [" it"]) for _ in range(6)]
        for job in read:
            assert torch.allclose(job.result()[0], alone, atol=1e-6)
        for job in jobs:
            assert max(map(difference, found, job.result())) < 1e-6


@pytest.mark.parametrize(("method", "architecture"), places([place for place in PLACES if place[0] in SOFT]))
def test_gradients_reach_what_trains_and_nothing_else(method, architecture):
    compressor = build(method, reader_of(architecture))
    assert isinstance(compressor, SoftCompressor)
    reader = compressor.base_reader  # what reads may be a tuned form of it, which trains
    ids = torch.tensor([[1, 7, 8, 9]])
    before = reader.model(input_ids=ids).logits
    weights = {name: t.clone() for name, t in reader.model.state_dict().items()}
    compressor.train()
    optimizer = torch.optim.SGD(compressor.parameters(), lr=0.1)
    passages = compressor.encode([TEXTS[0], TEXTS[2]])
    targets = compressor.reader.target_hidden([[p, "\n"] for p in passages], [TEXTS[0], TEXTS[2]])
    cross_entropy(compressor.reader.head(targets.hidden), targets.ids).backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, name
        # A head's bias shifts all log-odds alike, which a softmax over them does not see.
        assert parameter.grad.abs().max() > 0 or name == "words.tagger.head.bias", name
    assert set(compressor.trainable_state()) == {name for name, _ in compressor.named_parameters()}
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())
    assert all(torch.equal(t, weights[name]) for name, t in reader.model.state_dict().items())
    assert torch.equal(reader.model(input_ids=ids).logits, before)
    assert not any("lora" in name for name, _ in reader.model.named_modules())


@methods
def test_moving_or_casting_the_compressor_leaves_the_reader_alone(method):
    compressor = build(method, reader_of("llama"))
    compressor.half().double().float().requires_grad_(False).train()
    for reader in (compressor.reader, compressor.base_reader):
        assert all(p.dtype == torch.float32 for p in reader.model.parameters())
        assert not reader.model.training
    assert max(map(difference, compress(compressor, TEXTS), compress(compressor.eval(), TEXTS))) == 0


@methods
def test_slots_are_in_the_readers_dtype(method, zoo):
    reader = Reader.from_pretrained(zoo.model("llama").to(torch.bfloat16), tokenizer=zoo.tokenizer())
    compressor = build(method, reader)
    passage = compress(compressor, TEXTS[:1])[0]
    tensors = [t for t in passage.tensors().values() if t.is_floating_point()]
    assert bool(tensors) == (passage.interface != "text")
    assert all(t.dtype == torch.bfloat16 for t in tensors)
    assert isinstance(compressor.reader.generate([[passage, "\nAnswer:"]], 2)[0], str)


@pytest.mark.slow
@methods
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(st.characters(), max_size=60), max_size=4), ratio=st.floats(1, 40))
def test_any_text_at_any_ratio(method, texts, ratio):
    compressor, _ = pair(method, "llama")
    found = compress(compressor, texts, ratio=ratio)
    assert len(found) == len(texts)
    for text, passage in zip(texts, found):
        assert passage.slots <= passage.source_tokens == len(compressor.reader.tokenize(text))
        if passage.interface == "text":
            assert passage.n_tokens == len(compressor.reader.tokenize(passage.text))
            assert passage.n_tokens - passage.info.get("over_budget", 0) <= passage.source_tokens / ratio + 1e-6
            if method not in WRITING:
                assert passage.text or not text.strip()
                assert "structure" in passage.info or passage.text == " ".join(text[a:b] for a, b in passage.spans)


@methods
def test_bad_input_is_refused_with_a_sentence(method):
    compressor, _ = pair(method, "llama")
    with pytest.raises(TypeError, match="list of passages"):
        compressor.compress("one text")
    with pytest.raises(TypeError, match="number 1"):
        compressor.compress(["a", None])
    for ratio in (0.5, float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="at least 1"):
            compressor.compress(["a"], ratio=ratio)
    with pytest.raises(ValueError, match="no settings"):
        compressor.config_class.from_dict({"nonsense": 1})
