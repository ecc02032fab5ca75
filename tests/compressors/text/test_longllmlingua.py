"""LongLLMLingua: contrastive scores, ranks and dynamic ratios against plain computations."""

from __future__ import annotations

import math

import pytest
import torch
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from nutgraf.adapters.llama_index import CompressedContextPostprocessor
from nutgraf.benchmarks.methods import named_methods
from nutgraf.compressors import Reader
from nutgraf.compressors.text.longllmlingua import LongLLMLinguaCompressor, LongLLMLinguaConfig, reorder
from nutgraf.compressors.text.published.llmlingua import (
    STATEMENT,
    LongLLMLinguaOptions,
    compress_prompt,
    context_losses,
    rank_contexts,
)
from oracles.selection import FACTS, ODD, Forwarded, by_hand, losses_of, passage

QUESTION = "Who signed the treaty of Westphalia?"


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, **settings) -> LongLLMLinguaCompressor:
    return LongLLMLinguaCompressor(LongLLMLinguaConfig.from_dict(settings), reader)


def nll_behind(reader: Reader, head: list[int], ids: list[int]) -> torch.Tensor:
    whole = [*reader.bos_ids, *head, *ids]
    return torch.tensor(losses_of(reader, whole))[len(whole) - 1 - len(ids) :]


# -- fast ----------------------------------------------------------------------------------------------------------------


def test_scores_are_the_loss_without_the_question_minus_the_loss_behind_it(reader):
    other = "What carries sediment?"
    for text, question, found in zip(
        FACTS, [QUESTION, other, QUESTION], build(reader).score(FACTS, [QUESTION, other, QUESTION])
    ):
        ids = reader.tokenize(text)
        want = nll_behind(reader, [], ids) - nll_behind(reader, reader.tokenize(question + "\n\n"), ids)
        assert torch.allclose(found.nll, want, atol=1e-4)
        assert found.ids == ids
        assert want.abs().max() > 0.1


def test_budgets_are_exact_and_the_question_decides(reader):
    texts = [passage(60, seed) for seed in range(3)] + ["", *ODD]
    compressor = build(reader)
    one, two = (compressor.compress(texts, query=q, ratio=3) for q in (QUESTION, "Which river is the longest?"))
    for found in (one, two):
        for text, p in zip(texts, found):
            assert p.n_tokens == len(reader.tokenize(p.text)) <= p.source_tokens / 3 + 1e-6
            assert p.text == " ".join(text[a:b] for a, b in p.spans)
    assert one[0].text != two[0].text


def test_tokens_are_read_once_with_and_once_without_the_question(reader):
    texts = [passage(4 + 9 * seed, seed) for seed in range(26)]
    lengths = [len(reader.tokenize(text)) for text in texts]
    question = len(reader.tokenize(QUESTION + "\n\n"))
    with Forwarded(reader.model.get_decoder()) as seen:
        build(reader).compress(texts, query=QUESTION)
    both = 2 * sum(lengths) + question * len(texts)
    assert 0.9 * both < seen.positions <= seen.padded <= 1.05 * both


def test_a_question_is_needed(reader):
    with pytest.raises(ValueError, match="got none"):
        build(reader).compress(FACTS)
    with pytest.raises(ValueError, match="got none"):
        build(reader).compress(FACTS, query=[QUESTION, None, QUESTION])
    with pytest.raises(ValueError, match="got none"):
        build(reader).compress([""], query=" ")
    with pytest.raises(ValueError, match="got none"):
        build(reader).rank(FACTS)
    fixed = build(reader, question=QUESTION)
    assert [p.text for p in fixed.compress(FACTS)] == [p.text for p in build(reader).compress(FACTS, query=QUESTION)]
    with pytest.raises(ValueError, match="question must be"):
        LongLLMLinguaConfig.from_dict({"question": " "})


def test_adapters_and_benchmarks_hand_the_question_over(reader):
    compressor = build(reader, ratio=2.0)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in FACTS]
    asked = CompressedContextPostprocessor(compressor).postprocess_nodes(nodes, QueryBundle(QUESTION))
    assert [node.node.get_content(MetadataMode.LLM) for node in asked] == [
        passage.text for passage in compressor.compress(FACTS, QUESTION)
    ]
    (method,) = named_methods(reader, ["longllmlingua@2"], [])
    assert method.query_aware
    assert method.name == "longllmlingua-query"


def test_passages_are_ranked_by_the_question_behind_them(reader):
    texts = [passage(12 + seed, seed) for seed in range(6)]
    compressor = build(reader)
    found = compressor.rank_losses(texts, QUESTION)
    for text, loss in zip(texts, found):
        want = nll_behind(reader, reader.tokenize(text + "\n\n"), reader.tokenize(QUESTION + STATEMENT)).mean()
        assert loss == pytest.approx(float(want), abs=1e-4)
    order = compressor.rank(texts, QUESTION)
    assert [found[i] for i in order] == sorted(found)
    assert [texts[i] for i in order] == [texts[::-1][i] for i in compressor.rank(texts[::-1], QUESTION)]


def test_a_passage_beyond_the_window_is_ranked_by_its_best_part(reader):
    compressor = build(reader, window=128)
    long = passage(300)
    ids = reader.tokenize(long)
    tail = reader.tokenize("\n\n") + reader.tokenize(QUESTION + STATEMENT)
    span = 128 - len(reader.bos_ids) - len(tail) + 1
    starts = range(0, len(ids), span - span // 32)  # every window repeats a bit of the one before
    assert len(starts) > 2
    asked = len(reader.tokenize(QUESTION + STATEMENT))
    want = [nll_behind(reader, ids[a : a + span], tail)[-asked:].mean() for a in starts if a + span // 32 < len(ids)]
    assert compressor.rank_losses([long], QUESTION)[0] == pytest.approx(float(min(want)), abs=1e-4)
    with pytest.raises(ValueError, match="leaves no room"):
        compressor.rank([long], QUESTION * 30)
    assert compressor.rank(["", FACTS[0]], QUESTION) == [1, 0]


def test_ranking_needs_no_pass_of_its_own(reader):
    texts = [passage(40, seed) for seed in range(6)]
    tail = len(reader.tokenize("\n\n")) + len(reader.tokenize(QUESTION + STATEMENT))
    compressor = build(reader, dynamic_ratio=0.3)
    with Forwarded(reader.model.get_decoder()) as seen:
        plain = build(reader).score(texts, [QUESTION] * 6)
    with Forwarded(reader.model.get_decoder()) as ranked:
        found = compressor.score(texts, [QUESTION] * 6)
    assert ranked.positions == seen.positions + 6 * tail
    for a, b in zip(plain, found):
        assert torch.allclose(a.nll, b.nll, atol=1e-5)
        assert a.ending is None
    assert [scores.ending for scores in found] == pytest.approx(compressor.rank_losses(texts, QUESTION), abs=1e-5)


def test_dynamic_ratios_follow_the_rank_and_keep_the_total(reader):
    texts = [passage(40 + 7 * seed, seed) for seed in range(5)]
    lengths = [len(reader.tokenize(text)) for text in texts]
    compressor = build(reader, dynamic_ratio=0.3)
    found = compressor.compress(texts, query=QUESTION, ratio=2.5)
    order = compressor.rank(texts, QUESTION)
    assert [found[i].info["rank"] for i in order] == [0, 1, 2, 3, 4]
    total = sum(math.floor(n / 2.5 + 1e-9) for n in lengths)
    assert total - 15 <= sum(p.n_tokens for p in found) <= total
    rates = [found[i].n_tokens / lengths[i] for i in order]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] - rates[-1] > 0.35
    # results are one for each in the caller's order
    backwards = compressor.compress(texts[::-1], query=QUESTION, ratio=2.5)[::-1]
    assert [p.text for p in backwards] == [p.text for p in found]
    assert [p.info["rank"] for p in reorder(found)] == [0, 1, 2, 3, 4]
    assert [p.info["rank"] for p in reorder(found, "two_stage")] == [0, 2, 4, 3, 1]
    assert reorder(found, "original") == found
    with pytest.raises(ValueError, match="no info"):
        reorder(build(reader).compress(texts, query=QUESTION))


def test_passages_of_different_questions_do_not_share(reader):
    texts = [passage(40, seed) for seed in range(4)]
    compressor = build(reader, dynamic_ratio=0.3)
    other = "Which river is the longest?"
    mixed = compressor.compress(texts, query=[QUESTION, other, QUESTION, other])
    pairs = compressor.compress(texts[::2], query=QUESTION), compressor.compress(texts[1::2], query=other)
    assert [p.text for p in mixed[::2]] == [p.text for p in pairs[0]]
    assert [p.text for p in mixed[1::2]] == [p.text for p in pairs[1]]
    # with one passage, nothing or nothing to keep there is nothing to share
    assert compressor.compress(texts[:1], query=QUESTION)[0].text
    assert compressor.compress([], query=QUESTION) == []
    assert [p.n_tokens for p in compressor.compress(["", texts[0]], query=QUESTION, target_tokens=0)] == [0, 0]


# -- published -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_instruction_may_stand_behind_the_question(reader):
    text, instruction = passage(150), "Answer in one word."
    prefix = f"{QUESTION}\n\n{instruction}\n\n"
    ids = reader.prompts.encode(prefix + text, opens=True)
    start = len(reader.prompts.encode(prefix, opens=True))
    want = by_hand(reader, ids, 80 / (len(ids) - start + 3), 50, start)
    given = dict(target=80, question=QUESTION, instruction=instruction)
    found = compress_prompt(reader, [text], LongLLMLinguaOptions(iterative_size=50, add_instruction=True), **given)
    assert found.text == reader.decode([ids[i] for i in want])
    assert found.prompt == f"{instruction}\n\n{found.text}\n\n{QUESTION}"
    assert found.text != compress_prompt(reader, [text], LongLLMLinguaOptions(iterative_size=50), **given).text


def test_tokens_may_stay_whole(reader):
    texts = [passage(40, 1), passage(40, 2), passage(40, 3)]
    options = LongLLMLinguaOptions(token_filter=False, context_budget=0, reorder="sort")
    found = compress_prompt(reader, texts, options, target=40, question=QUESTION)
    best = rank_contexts(reader, texts, QUESTION)[0]
    assert found.order == (best,)
    assert found.text == texts[best]
    assert found.spans == ((0, len(texts[best])),)
    assert found.kept_tokens == found.source_tokens == len(reader.prompts.encode(texts[best], opens=True))


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "size"), [(2, 40), (4, 60), (1.2, 200)])
def test_published_equals_the_published_loop(reader, ratio, size):
    text = passage(230)
    prefix = QUESTION + "\n\n"
    ids = reader.prompts.encode(prefix + text, opens=True)
    start = len(reader.prompts.encode(prefix, opens=True))
    n, q = (len(reader.prompts.encode(t, opens=True)) for t in (text, QUESTION))
    bos = len(reader.bos_ids)
    assert len(ids) == start + n
    target = (n + q + 3 * bos) / ratio - q - 2 * bos
    want = by_hand(reader, ids, min(max(target / (n + 3), 0), 1), size, start)
    found = compress_prompt(
        reader, [text], LongLLMLinguaOptions(iterative_size=size), rate=1 / ratio, question=QUESTION
    )
    assert found.text == reader.decode([ids[i] for i in want])
    assert found.kept_tokens == len(want) < n
    (p,) = build(reader, mode="published", iterative_size=size).compress([text], query=QUESTION, ratio=ratio)
    assert p.text == found.text
    assert all(0 <= a < b <= len(text) for a, b in p.spans)


def test_published_ranks_by_the_question_right_behind_the_context(reader):
    contexts = [passage(20 + seed, seed) for seed in range(5)]
    losses = context_losses(reader, contexts, QUESTION)
    for context, loss in zip(contexts, losses):
        head = reader.bos_ids + reader.prompts.encode(context, opens=True)
        whole = reader.bos_ids + reader.prompts.encode(context + QUESTION + STATEMENT, opens=True)
        tail = losses_of(reader, whole)[len(head) - 1 :]
        assert loss == pytest.approx(sum(tail) / len(tail), abs=1e-4)
    ranks = rank_contexts(reader, contexts, QUESTION)
    assert [losses[i] for i in ranks] == sorted(losses)
    before = context_losses(reader, contexts, QUESTION, "before")
    for context, loss in zip(contexts, before):
        head = reader.bos_ids + reader.prompts.encode(QUESTION + STATEMENT, opens=True)
        whole = reader.bos_ids + reader.prompts.encode(QUESTION + STATEMENT + context, opens=True)
        tail = losses_of(reader, whole)[len(head) - 1 :]
        assert loss == pytest.approx(sum(tail) / len(tail), abs=1e-4)
    for condition, want in (
        ("before", sorted(range(5), key=lambda i: before[i])),
        ("none", rank_contexts(reader, contexts)),
    ):
        found = build(reader, mode="published", iterative_size=40, reorder="sort", condition=condition).compress_prompt(
            contexts, question=QUESTION, target_tokens=1e6
        )
        assert list(found.order) == want != ranks
    with pytest.raises(ValueError, match="condition must be"):
        build(reader, condition="beside")
    compressor = build(reader, mode="published", iterative_size=40, reorder="sort", dynamic_ratio=0.2, context_budget=0)
    found = compressor.compress_prompt(contexts, question=QUESTION, ratio=2)
    assert list(found.order) == ranks[: len(found.order)]
    assert found.prompt.endswith(f"\n\n{QUESTION}")
    assert QUESTION not in found.text
    with pytest.raises(ValueError, match="by a question"):
        compressor.compress_prompt(contexts)
