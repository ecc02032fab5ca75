"""What every method that keeps pairs must do: what must stay, sinks, room after a passage, attention implementations."""

from __future__ import annotations

import copy

import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors.kv.probing import REPEAT, write_probes
from nutgraf.compressors.kv.selection import SCORES

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
OTHER = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: when?\nAnswer:"


def without_bos(zoo) -> Reader:
    tokenizer = copy.deepcopy(zoo.tokenizer())
    kind = tokenizer.backend_tokenizer.post_processor.__class__
    tokenizer.backend_tokenizer.post_processor = kind(single="$A", special_tokens=[])
    return Reader.from_pretrained(zoo.model("llama"), tokenizer=tokenizer)


def kept_by_head(passage) -> list[set[int]]:
    """Tokens of the passage that each head keeps."""
    at = passage.positions - passage.span[0]
    return [set(part.tolist()) for part in at.split(passage.counts.flatten().tolist())]


@pytest.mark.parametrize("budget", ["global", "per-layer", "uniform"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": ["Westphalia"]}, ["Westphalia"]),
        ({"keep_patterns": [r"\d{4}"]}, ["1648"]),
        ({"keep_digits": True}, ["1648"]),
        ({"keep_names": True}, ["Westphalia", "Europe"]),
        ({"keep_patterns": [r"\AThe treaty"]}, ["The", "treaty"]),  # a prefix
    ],
)
def test_what_must_stay_is_in_every_head_within_the_budget(zoo, budget, settings, words):
    reader = zoo.reader("llama")
    compressor = load_compressor("kv-match", reader=reader, score="random", repair="none", budget=budget, **settings)
    passage = compressor.compress([OTHER, TEXT], ratio=2)[1]
    ids, places = reader.tokenize_with_offsets(TEXT)
    spans = [(TEXT.index(word), TEXT.index(word) + len(word)) for word in words]
    wanted = {i for i, (start, end) in enumerate(places) if any(start < b and a < end for a, b in spans)}
    assert len(wanted) >= len(words)
    assert all(wanted <= kept for kept in kept_by_head(passage))
    assert int(passage.counts.sum()) <= len(ids) * passage.counts.numel() / 2


def test_a_setting_changed_later_changes_the_fingerprint(zoo):
    compressor = load_compressor("kv-match", reader=zoo.reader("llama"), probes=4)
    before = compressor.fingerprint
    compressor.config.ratio = 8.0
    wanted = load_compressor("kv-match", reader=zoo.reader("llama"), probes=4, ratio=8.0)
    assert compressor.fingerprint == wanted.fingerprint != before


def test_more_than_the_budget_is_refused_with_a_ratio_that_works(zoo):
    compressor = load_compressor("kv-match", reader=zoo.reader("llama"), score="first", repair="none", keep=[TEXT[:60]])
    with pytest.raises(ValueError, match=r"What must stay takes \d+ of the \d+ tokens .* ask for ratio [\d.]+") as told:
        compressor.compress([TEXT], ratio=8)
    ratio = float(str(told.value).partition("ask for ratio ")[2].split()[0])
    assert compressor.compress([TEXT], ratio=ratio)[0].slots
    assert compressor.compress([OTHER], ratio=8)[0].slots  # nothing of it must stay
    for wrong, message in (
        ({"keep": "word"}, "must be a list"),
        ({"keep_patterns": ["("]}, "no valid regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            load_compressor("kv-match", reader=zoo.reader("llama"), **wrong)


@pytest.mark.parametrize("score", sorted(set(SCORES) - {"snapkv"}))
def test_the_sink_is_never_evicted(zoo, score):
    """Without a BOS the first token is in every head; a BOS stays in the prompt, and the passage follows it."""
    for budget in ("global", "per-layer", "uniform"):
        settings = {"score": score, "budget": budget, "repair": "none", "probes": 2}
        bare = load_compressor("kv-match", reader=without_bos(zoo), **settings).compress([TEXT], ratio=16)[0]
        assert all(0 in kept for kept in kept_by_head(bare))
        reader = zoo.reader("llama")
        passage = load_compressor("kv-match", reader=reader, **settings).compress([TEXT], ratio=16)[0]
        assert passage.span[0] == len(reader.bos_ids) == 1
        plan = reader.plan([[passage, QUESTION]])[0]
        assert (plan.ids[0], plan.kv[0][0]) == (reader.bos_ids[0], 1)


def test_probes_that_do_not_fit_are_left_out_or_divided(zoo):
    reader = zoo.reader("llama")
    every = write_probes(reader, TEXT, "questions", 48, None)
    room = sorted(map(len, every))[len(every) // 2]
    assert write_probes(reader, TEXT, "questions", 48, None, room) == [p for p in every if len(p) <= room]
    opening = [i for part in reader.tokenize_batch(list(REPEAT)) for i in part]
    passage = reader.tokenize(TEXT)
    pieces = write_probes(reader, TEXT, "repetition", 48, None, len(opening) + 10)
    assert [i for piece in pieces for i in piece[len(opening) :]] == passage
    assert all(piece[: len(opening)] == opening and len(piece) <= len(opening) + 10 for piece in pieces)
    assert write_probes(reader, TEXT, "repetition", 48, None, 1000) == [[*opening, *passage]]
    # a reader in which a passage and a question fit, but not the passage twice
    n = len(passage) + len(reader.bos_ids)
    for score in ("probes", "kvzip"):
        narrow = zoo.reader("llama", max_position_embeddings=n + len(opening) + 10)
        found = load_compressor("kv-match", reader=narrow, score=score).compress([TEXT, "a"], ratio=4)
        assert isinstance(narrow.generate([[found[0], "\nA:"]], 2)[0], str)
        with pytest.raises(ValueError, match="cut the passage into shorter ones"):
            load_compressor("kv-match", reader=narrow, score=score).compress([TEXT + OTHER])
    asked = load_compressor("kv-match", reader=narrow, score="snapkv")
    with pytest.raises(ValueError, match="cut the passage into shorter ones"):
        asked.compress([TEXT], query="which of all the powers of Europe signed the treaty?" * 3)


@pytest.mark.slow
def test_a_compiled_reader_makes_and_reads_the_same_passages(zoo):
    plain, compiled = zoo.reader("llama", num_hidden_layers=1), zoo.model("llama", num_hidden_layers=1)
    compiled.model = torch.compile(compiled.model, backend="eager", dynamic=True)
    reader = Reader(compiled, zoo.tokenizer())
    want, found = (load_compressor("kv-match", reader=r, probes=2).compress([TEXT])[0] for r in (plain, reader))
    assert torch.allclose(found.keys[0], want.keys[0], atol=1e-5)
    logits, got = (r.target_logits([[p, QUESTION]], [" x"])[0] for r, p in ((plain, want), (reader, found)))
    assert torch.allclose(got, logits, atol=1e-4)
    assert reader.generate([[found, QUESTION]], 3) == plain.generate([[want, QUESTION]], 3)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_without_a_mask_is_refused_with_a_sentence(zoo, implementation):
    reader = zoo.reader("llama")
    passage = load_compressor("kv-match", reader=reader, probes=2).compress([TEXT])[0]
    reader.model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=r'reads no KV passages .* attn_implementation="sdpa"'):
        load_compressor("kv-match", reader=reader)
    with pytest.raises(ValueError, match="reads no KV passages"):
        reader.generate([[passage, QUESTION]], 1)
