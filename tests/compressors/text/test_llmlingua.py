"""LLMLingua: exact budgets in one pass, shares, and the released algorithm against a plain loop."""

from __future__ import annotations

import math
import re

import legacy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import Reader
from nutgraf.compressors.core.units import split_units
from nutgraf.compressors.text.budget import kept_share, share_out
from nutgraf.compressors.text.llmlingua import LLMLinguaCompressor, LLMLinguaConfig
from nutgraf.compressors.text.published.llmlingua import (
    LLMLinguaOptions,
    LongLLMLinguaOptions,
    choose_contexts,
    compress_prompt,
    context_losses,
    rank_contexts,
    reordered,
    sentences_of,
    widened,
)
from nutgraf.compressors.text.published.windows import window_plan
from oracles.selection import FACTS, ODD, Forwarded, by_hand, losses_of, passage


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, **settings) -> LLMLinguaCompressor:
    return LLMLinguaCompressor(LLMLinguaConfig.from_dict(settings), reader)


# -- fast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 1.3, 2, 5, 40])
@pytest.mark.parametrize("complete", [True, False])
def test_exact_budgets_spans_and_whole_characters(reader, ratio, complete):
    texts = [*FACTS, *ODD, "", passage(120)]
    found = build(reader, complete_words=complete, keep_digits=ratio < 2).compress(texts, ratio=ratio)
    for text, p in zip(texts, found):
        assert p.n_tokens == len(reader.tokenize(p.text)) <= p.source_tokens
        assert p.n_tokens - p.info.get("over_budget", 0) <= p.source_tokens / ratio + 1e-6
        assert "over_budget" not in p.info or p.n_tokens <= 4
        assert p.text == " ".join(text[a:b] for a, b in p.spans)
        assert set(p.text) <= set(text) | {" "}
        if text.isascii() and text.strip() and len(text) < 900 and " " in text:
            assert p.n_tokens >= p.source_tokens / ratio - 4


def test_tokens_bring_the_rest_of_their_words(reader):
    text = "Photosynthesis converts sunlight, water and minerals into oxygen and energy-rich organic compounds. " * 3
    (whole,) = build(reader).compress([text], ratio=3)
    (parts,) = build(reader, complete_words=False).compress([text], ratio=3)
    words = set(re.findall(r"\w+", text))
    assert set(re.findall(r"\w+", whole.text)) <= words
    assert not set(re.findall(r"\w+", parts.text)) <= words


def test_a_word_is_worth_its_best_token(reader):
    compressor = build(reader)
    text = FACTS[0]
    (scores,) = compressor.score([text])
    units = split_units(text, "word")
    values = compressor.unit_values(units, scores)
    for (a, b), value in zip(units, values.tolist()):
        own = [s for (x, _), s in zip(scores.offsets, scores.nll.tolist()) if a <= x < b]
        assert value == pytest.approx(max(own))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 50) | st.just(0.0), st.integers(0, 60)), min_size=1, max_size=8),
    total=st.integers(0, 300),
)
def test_shares_are_exact(rows, total):
    weights, caps = [w for w, _ in rows], [c for _, c in rows]
    out = share_out(total, weights, caps)
    assert sum(out) == min(total, sum(caps))
    assert all(0 <= n <= c for n, c in zip(out, caps))
    free = [(n / w) for n, w, c in zip(out, weights, caps) if n < c and w > 1e-3]
    slack = max((1 / w for w in weights if w > 1e-3), default=0)
    assert not free or max(free) - min(free) <= 2 * slack + 1e-6


def test_a_ratio_gives_back_the_share_that_it_was_made_of():
    for percent in range(1, 101):
        assert kept_share(1 / (percent / 100)) == percent / 100
    assert kept_share(3) == pytest.approx(1 / 3, abs=1e-12)


def test_bad_shares_are_refused():
    with pytest.raises(ValueError, match="got 1 caps for 2 weights"):
        share_out(3, [1, 2], [1])
    with pytest.raises(ValueError, match="at least 0"):
        share_out(3, [-1.0], [1])


# -- published -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.25, 2, 6])
@pytest.mark.parametrize("size", [40, 200])
def test_published_equals_the_published_loop(reader, ratio, size):
    text = passage(380)
    ids = reader.prompts.encode(text, opens=True)
    assert len(ids) > 2 * size
    found = compress_prompt(reader, [text], LLMLinguaOptions(iterative_size=size), rate=1 / ratio)
    bos = len(reader.bos_ids)
    target = (len(ids) + 3 * bos) / ratio - 2 * bos
    want = by_hand(reader, ids, min(max(target / (len(ids) + 3), 0), 1), size)
    assert found.text == reader.decode([ids[i] for i in want])
    assert found.kept_tokens == len(want) < len(ids)
    assert found.source_tokens == len(ids)
    (p,) = build(reader, mode="published", iterative_size=size).compress([text], ratio=ratio)
    assert p.text == found.text
    assert p.n_tokens == len(reader.tokenize(p.text))
    assert "".join(text[a:b] for a, b in p.spans).replace(" ", "") == p.text.replace(" ", "")


@pytest.mark.parametrize("kind", legacy.RELEASED)
def test_published_on_tokenizers_that_put_a_space_before_a_text(zoo, kind):
    reader = Reader(zoo.model("llama"), legacy.tokenizer(kind))
    text = f"{passage(12)}\n\n{FACTS[0]}"
    ids = legacy.spelled(kind, text)
    found = compress_prompt(reader, [text], LLMLinguaOptions(iterative_size=50), target=60)
    want = by_hand(reader, ids, 60 / (len(ids) + 3), 50)
    assert found.source_tokens == len(ids)
    assert found.text == reader.decode([ids[i] for i in want])
    assert found.kept_tokens == len(want)
    split = compress_prompt(reader, [text], LLMLinguaOptions(iterative_size=50, keep_split=True), target=60)
    assert split.text.count("\n") == 2


def test_published_leaves_a_text_shorter_than_a_window_practically_whole(reader):
    text = passage(50)
    n = len(reader.prompts.encode(text, opens=True))
    assert n < 190
    found = compress_prompt(reader, [text], LLMLinguaOptions(), rate=0.2)
    assert n - 2 <= found.kept_tokens <= n
    assert build(reader, mode="published").compress([""])[0].text == ""


def test_contexts_are_ranked_and_chosen_as_published(reader):
    contexts = [passage(30, seed) for seed in range(5)]
    losses = context_losses(reader, contexts)
    for context, loss in zip(contexts, losses):
        alone = losses_of(reader, reader.bos_ids + reader.tokenize(context))
        assert loss == pytest.approx(sum(alone) / len(alone), abs=1e-4)
    ranks = rank_contexts(reader, contexts)
    assert [losses[i] for i in ranks] == sorted(losses, reverse=True)
    # 60 + 40 tokens of budget: 50, 30, and the crossing one
    order, shifts = choose_contexts([3, 1, 0, 2], [30, 30, 99, 50], 60, extra=40, reorder="sort", shift=0.3)
    assert order == [3, 1, 0]
    assert shifts == pytest.approx([0.3, 0.0, -0.3])
    order, shifts = choose_contexts([3, 1, 0, 2], [30, 30, 99, 50], 60, extra=40, reorder="original", shift=0.3)
    assert order == [0, 1, 3]
    assert shifts == pytest.approx([-0.3, 0.0, 0.3])
    assert choose_contexts([1, 0], [9, 150], -5)[0] == [0, 1]  # a negative target counts as 100
    assert choose_contexts([1, 0], [9, 250], -5)[0] == [1]
    # a forced context comes first, and is paid for where the ranks reach it
    order, shifts = choose_contexts([3, 1, 0, 2], [30, 30, 99, 50], 60, reorder="sort", shift=0.3, extra=0, forced=[2])
    assert order == [2, 3, 1]
    assert shifts == pytest.approx([0.3, 0.0, -0.3])
    assert choose_contexts([2, 0, 1], [30, 30, 70], 60, reorder="sort", extra=0, forced=[2, 2])[0] == [2]
    assert reordered([4, 2, 0, 1, 3], "two_stage") == [4, 0, 3, 1, 2]
    with pytest.raises(ValueError, match="two_stage"):
        reordered([1], "best")


def test_windows_span_contexts_and_the_first_is_one_short():
    plan = window_plan([30, 50, 170], 125, 100, [0.1, 0.0, -0.7])
    tau = 125 / 251
    assert [[n for n, _ in window] for window in plan] == [[30, 50, 19], [100], [51]]
    assert [ratio for _, ratio in plan[0]] == pytest.approx([tau + 0.1, tau, 0.0])


def test_the_pipeline_over_contexts(reader):
    contexts = [passage(60, seed) for seed in range(4)]
    compressor = build(reader, mode="published", iterative_size=50, reorder="sort", dynamic_ratio=0.3, context_budget=0)
    found = compressor.compress_prompt(contexts, instruction="Read.", question="Who?", ratio=2)
    assert found.prompt == f"Read.\n\n{found.text}\n\nWho?"
    assert list(found.order) == rank_contexts(reader, contexts)[: len(found.order)]
    assert 1 < len(found.order) < 4
    assert found.shifts[0] == pytest.approx(0.3)
    assert found.shifts[-1] == pytest.approx(-0.3)
    joined = "\n\n".join(contexts[i] for i in found.order)
    assert all(0 <= a < b <= len(joined) for a, b in found.spans)
    last = rank_contexts(reader, contexts)[-1]
    assert last not in found.order
    assert last in compressor.compress_prompt(contexts, ratio=2, forced=[last]).order
    with pytest.raises(ValueError, match="got 4"):
        compressor.compress_prompt(contexts, forced=[4])
    shorter = compressor.compress_prompt(contexts, target_tokens=40)
    assert shorter.kept_tokens < found.kept_tokens


@pytest.mark.parametrize("limit", [200, 330])
def test_texts_beyond_the_models_positions_slide_through_it(reader, zoo, limit):
    """The release's cache: beyond the limit tokens go from behind the first ten, and positions stay as they were."""
    small = zoo.reader("llama", max_position_embeddings=limit)
    text, size = passage(420), 40
    ids = small.prompts.encode(text, opens=True)
    assert len(ids) > limit + 100
    with Forwarded(small.model.get_decoder()) as seen:
        found = compress_prompt(small, [text], LLMLinguaOptions(iterative_size=size), rate=0.5)
    assert 0.35 * len(ids) < found.kept_tokens < 0.65 * len(ids)
    # one look at what the model has positions for, then the kept tokens of a window again with the next one
    assert seen.positions <= limit + len(ids) + found.kept_tokens
    whole = compress_prompt(reader, [text], LLMLinguaOptions(iterative_size=size), rate=0.5)
    assert found.text != whole.text
    # the first window is chosen by the losses of that look alone
    losses = losses_of(small, ids[:limit])
    threshold = sorted(losses, reverse=True)[int(len(losses) * min(max(_tau(small, ids), 0), 1)) - 1]
    first = [i for i in range(size - 1) if losses[i] > threshold]
    assert found.text.startswith(small.decode([ids[i] for i in first]))


def _tau(reader: Reader, ids: list[int]) -> float:
    bos = len(reader.bos_ids)
    return ((len(ids) + 3 * bos) / 2 - 2 * bos) / (len(ids) + 3)


def test_no_token_of_the_kept_prefix_is_read_again(reader):
    text, size = passage(380), 40
    n = len(reader.prompts.encode(text, opens=True))
    with Forwarded(reader.model.get_decoder()) as seen:
        found = compress_prompt(reader, [text], LLMLinguaOptions(iterative_size=size), rate=0.5)
    assert seen.positions <= 2 * n + found.kept_tokens


def test_budgets_may_be_steps():
    assert widened(50.0, "+100") == widened(50.0, 100) == 150
    assert widened(50.0, " *1.5 ") == 75
    assert widened(50.0, "-20") == 30
    assert widened(50.0, "/4") == 12.5
    for bad in ("100", "+", "**2", "__import__('os')", "/0", -1.0, math.nan):
        with pytest.raises(ValueError, match="context_budget"):
            widened(50.0, bad)
    assert choose_contexts([1, 0], [9, 150], 100, extra="*1.4")[0] == [1]
    assert choose_contexts([1, 0], [9, 150], 100, extra="*1.6")[0] == [0, 1]


def test_whole_sentences_go_first(reader):
    contexts = [" ".join(FACTS), " ".join(FACTS[::-1]) + " A last one. "]
    assert ["".join(sentences_of(c)) for c in contexts] == contexts
    assert sentences_of("One. Two. ") == ["One. ", "Two. "]
    assert sentences_of("") == []
    flat = [s for c in contexts for s in sentences_of(c)]
    losses = context_losses(reader, flat)
    target = 60.0
    left, want = 1.4 * target, set()
    for i in sorted(range(len(flat)), key=lambda i: -losses[i]):
        want.add(i)
        left -= len(reader.bos_ids) + len(reader.prompts.encode(flat[i], opens=True))
        if left < 0:
            break
    assert 0 < len(want) < len(flat)
    # windows longer than the text: whatever the filter leaves stays
    compressor = build(reader, mode="published", iterative_size=2000, sentence_budget=1.4, context_budget=1e6)
    found = compressor.compress_prompt(contexts, target_tokens=target)
    count = len(sentences_of(contexts[0]))
    parts = ("".join(s for i, s in enumerate(flat) if i in want and (i < count) == own) for own in (True, False))
    assert found.text == "\n\n".join(parts)
    plain = build(reader, mode="published", iterative_size=2000, context_budget=1e6)
    assert plain.compress_prompt(contexts, target_tokens=target).text == "\n\n".join(contexts)
    assert "sentence_budget" not in plain.config.to_dict()


def test_line_breaks_side_by_side_stay(reader):
    text = "\n\n".join(passage(12, seed) for seed in range(12))
    assert len(reader.tokenize("\n")) == 1
    kept, plain = (
        build(reader, mode="published", iterative_size=50, keep_split=keep).compress_prompt([text], ratio=4).text
        for keep in (True, False)
    )
    assert kept.count("\n\n") == 11
    assert plain.count("\n\n") < 11


def test_the_question_may_be_left_out_of_the_prompt(reader):
    compressor = build(reader, mode="published", iterative_size=40)
    text, question = passage(200), "Who signed the treaty of Westphalia, and when?"
    ends, bare = (
        compressor.compress_prompt([text], question=question, ratio=2, append_question=append)
        for append in (True, False)
    )
    assert ends.prompt == f"{ends.text}\n\n{question}"
    assert bare.prompt == bare.text
    assert bare.kept_tokens > ends.kept_tokens  # the question's tokens are not part of what is to be kept


def test_published_refuses_what_it_cannot_do(reader, zoo):
    small = zoo.reader("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match="64 positions"):
        build(small, mode="published").compress([passage(200)])
    with pytest.raises(TypeError, match="no options"):
        build(reader, mode="published").compress(FACTS, answers=True)
    with pytest.raises(ValueError, match="at least one context"):
        compress_prompt(reader, [], LLMLinguaOptions())
    with pytest.raises(ValueError, match="by a question"):
        compress_prompt(reader, FACTS, LongLLMLinguaOptions())
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        compress_prompt(reader, FACTS, LLMLinguaOptions(), rate=0)


def test_options_are_stored_flat_and_under_their_first_names(reader):
    stored = {"mode": "faithful", "iterative_size": 40, "keep_split": True, "ratio": 3.0}
    config = LLMLinguaConfig.from_dict(stored)
    assert (config.mode, config.published) == ("published", LLMLinguaOptions(iterative_size=40, keep_split=True))
    assert LLMLinguaConfig.from_dict(config.to_dict()) == config
    nested = LLMLinguaConfig.from_dict(
        {"mode": "published", "ratio": 3.0, "published": {"iterative_size": 40, "keep_split": True}}
    )
    assert nested == config
    assert LLMLinguaCompressor(config, reader).fingerprint != build(reader, mode="published").fingerprint
    with pytest.raises(ValueError, match="chunk_size"):
        LLMLinguaConfig.from_dict({"chunk_size": 2})


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "slow"},
        {"share": "scores"},
        {"iterative_size": 1},
        {"reorder": "best"},
        {"dynamic_ratio": 1.0},
        {"context_budget": -1.0},
        {"context_budget": "much"},
        {"sentence_budget": 0.0},
        {"window": 1},
        {"unit": "page"},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LLMLinguaConfig.from_dict(settings)
