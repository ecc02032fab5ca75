"""Mixed contexts: budgets are kept and filled, whatever the passages' lengths."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode
from nutgraf import Reader, make_compressor
from nutgraf.adapters.llama_index import (
    AutoBudget,
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressionEvent,
    Form,
    PassageCache,
    Policy,
    ScoreBudget,
    TextAbove,
    TextForTop,
    TokenBudget,
)
from texts import CURIE, NUT_GRAF, RIVERS, TREATY

TEXTS = [TREATY, RIVERS, CURIE, NUT_GRAF]


@pytest.fixture(scope="module")
def compressor(reader):
    return make_compressor("icae", reader, mem_size=16, ratio=4).eval()


@pytest.fixture(scope="module")
def llm(reader) -> CompressedContextLLM:
    return CompressedContextLLM(reader, max_new_tokens=2)


def compression(events: list[Any]) -> CompressionEvent:
    return [event for event in events if isinstance(event, CompressionEvent)][-1]


def scored(texts: list[str] = TEXTS) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1 - 0.2 * i) for i, text in enumerate(texts)]


def read(post: CompressedContextPostprocessor, nodes: list[NodeWithScore]) -> list[str]:
    """What the LLM reads of each node."""
    return [n.node.get_content(MetadataMode.LLM) for n in post.postprocess_nodes(nodes)]


def positions(reader: Reader, llm: CompressedContextLLM, contents: list[str]) -> int:
    return llm.complete("".join(f"{content}\n\n" for content in contents)).raw["reader_tokens"] - len(reader.bos_ids)


# -- what is chosen ------------------------------------------------------------------------------------------------------


def kinds(contents: list[str]) -> str:
    return "".join("c" if content.startswith("[[") else "t" for content in contents)


def test_by_rank_and_by_score(compressor, llm):
    post = CompressedContextPostprocessor(compressor, policy=TextForTop(2))
    assert kinds(read(post, scored())) == "ttcc"
    assert kinds(read(post, scored(TEXTS[:1]))) == "t"
    post = CompressedContextPostprocessor(compressor, policy=TextAbove(0.5))
    assert kinds(read(post, scored())) == "tttc"
    assert kinds(read(post, scored()[::-1])) == "cttt"
    with pytest.raises(ValueError, match="passage 1 has none"):
        post.postprocess_nodes([scored()[0], NodeWithScore(node=TextNode(text="x"))])


@pytest.mark.parametrize("n", [45, 80, 120, 160, 1000])
def test_a_token_budget_holds_as_many_texts_as_fit(reader, compressor, llm, n):
    contents = read(CompressedContextPostprocessor(compressor, policy=TokenBudget(n)), scored())
    chosen = kinds(contents)
    assert chosen == "t" * chosen.count("t") + "c" * chosen.count("c")  # the first ones
    assert positions(reader, llm, contents) <= n
    if chosen.count("c"):
        more = CompressedContextPostprocessor(compressor, policy=TextForTop(chosen.count("t") + 1))
        assert positions(reader, llm, read(more, scored())) > n


def test_what_finds_no_room_is_left_out(reader, compressor, llm, events):
    post = CompressedContextPostprocessor(compressor, policy=TokenBudget(25))
    out = post.postprocess_nodes(scored())
    assert [n.node.text for n in out] == TEXTS[: len(out)]
    assert 0 < len(out) < len(TEXTS)
    assert compression(events).left_out == len(TEXTS) - len(out)
    assert compression(events).as_text == 0
    with pytest.raises(ValueError, match=r"TokenBudget\(n=2\) has no room for even the first passage"):
        CompressedContextPostprocessor(compressor, policy=TokenBudget(2)).postprocess_nodes(scored())
    assert CompressedContextPostprocessor(compressor, policy=TokenBudget(2)).postprocess_nodes([]) == []


def test_an_auto_budget_takes_longer_forms_where_there_is_room(reader, compressor, llm):
    budgets = (32, 45, 52, 60, 68, 75)
    used = {AutoBudget: [], TokenBudget: []}
    for n in budgets:
        for policy in (AutoBudget(n, ratios=(1.5, 2, 3, 4)), TokenBudget(n)):
            contents = read(CompressedContextPostprocessor(compressor, policy=policy), scored())
            assert len(contents) == len(TEXTS)
            used[type(policy)].append(positions(reader, llm, contents))
    assert all(auto <= n for auto, n in zip(used[AutoBudget], budgets))
    assert all(auto >= plain for auto, plain in zip(used[AutoBudget], used[TokenBudget]))
    assert sum(used[AutoBudget]) > sum(used[TokenBudget]) + 10


def test_nothing_is_compressed_where_all_text_fits(compressor, llm, events):
    post = CompressedContextPostprocessor(compressor, policy=AutoBudget(4000), cache=PassageCache())
    assert kinds(read(post, scored())) == "tttt"
    assert (compression(events).compressed, compression(events).passages, compression(events).as_text) == (0, 0, 4)


def test_budgets_count_metadata(reader, compressor, llm):
    nodes = scored()
    for n in nodes:
        n.node.metadata["title"] = "a title of many words"
    for keep in (False, True):
        post = CompressedContextPostprocessor(compressor, policy=TokenBudget(120), keep_metadata=keep)
        contents = read(post, nodes)
        assert "t" in kinds(contents)
        assert positions(reader, llm, contents) <= 120


@dataclass
class Lengths:
    """Passages by their lengths alone."""

    text: list[int]

    @property
    def scores(self):
        return [None] * len(self.text)

    def text_positions(self):
        return self.text

    def compressed_positions(self, ratio, places):
        return [math.ceil(self.text[i] / (ratio or 4)) + 1 for i in places]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=8), st.integers(1, 600))
def test_budgets_are_never_passed(lengths, n):
    retrieved = Lengths(lengths)
    ratios = (2.0, 4.0, 16.0)

    def cost(place: int, form: Form) -> int:
        if form.read == "text":
            return lengths[place]
        return 0 if form.read == "left out" else retrieved.compressed_positions(form.ratio, [place])[0]

    for policy in (TokenBudget(n), AutoBudget(n), AutoBudget(n, ratios)):
        try:
            forms = policy.choose(retrieved)
        except ValueError:
            shortest = min(lengths[0], *(cost(0, Form("compressed", r)) for r in (4.0, 16.0)))
            assert shortest > n or policy != AutoBudget(n, ratios)
            continue
        total = sum(cost(i, form) for i, form in enumerate(forms))
        assert total <= n
        assert len(forms) == len(lengths)
        out = [form.read == "left out" for form in forms]
        assert out == sorted(out)  # the last ones
        if policy == AutoBudget(n, ratios) and not any(out):  # no passage could have had a longer form
            for i, form in enumerate(forms):
                own = cost(i, form)
                longer = [lengths[i], *(cost(i, Form("compressed", r)) for r in ratios)]
                assert not any(own < c <= own + n - total for c in longer if form.read == "compressed")


@dataclass
class Scored(Lengths):
    """Passages by lengths and scores."""

    given: list[float]

    @property
    def scores(self):
        return self.given


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), max_size=8), st.integers(1, 600))
def test_a_score_budget_is_kept(passages, n):
    retrieved = Scored([length for length, _ in passages], [score for _, score in passages])
    policy = ScoreBudget(n, highest=16)
    try:
        forms = policy.choose(retrieved)
    except ValueError:
        best = max(range(len(passages)), key=lambda i: retrieved.scores[i])
        assert retrieved.compressed_positions(16, [best])[0] + 1 > n
        return
    read = [i for i, form in enumerate(forms) if form.read == "compressed"]
    costs = [retrieved.compressed_positions(forms[i].ratio, [i])[0] for i in read]
    if sum(retrieved.text) <= n:
        assert {form.read for form in forms} <= {"text"}
        return
    assert sum(costs) <= n
    assert all(1 <= forms[i].ratio <= 16.01 for i in read)
    out = [retrieved.scores[i] for i, form in enumerate(forms) if form.read == "left out"]
    assert all(retrieved.scores[i] >= max(out, default=0) for i in read)


def test_slots_go_to_passages_of_higher_score(reader, compressor, llm):
    pooled = make_compressor("mean-pool", reader, encoder="embeddings").eval()
    post = CompressedContextPostprocessor(pooled, policy=ScoreBudget(60))
    contents = read(post, scored())
    assert kinds(contents) == "cccc"
    slots = [llm.complete(content).raw["slots"] for content in contents]
    assert slots[0] > slots[1] > slots[2] > slots[3] >= 1
    assert 40 < positions(reader, llm, contents) <= 60
    unscored = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    with pytest.raises(ValueError, match="passage 0 has none"):
        post.postprocess_nodes(unscored)
    unscored[0].score, unscored[1].score = 1.0, math.nan
    for policy in (ScoreBudget(60), TextAbove(0.5)):
        with pytest.raises(ValueError, match="passage 1 has nan"):
            CompressedContextPostprocessor(pooled, policy=policy).postprocess_nodes(unscored)


# -- the user's own, settings, refusals ----------------------------------------------------------------------------------


def test_a_policy_of_ones_own(compressor, llm):
    class EverySecond(Policy):
        def choose(self, retrieved):
            return [Form("text") if i % 2 else Form("compressed", 8) for i in range(len(retrieved.scores))]

    post = CompressedContextPostprocessor(compressor, policy=EverySecond())
    contents = read(post, scored())
    assert kinds(contents) == "ctct"
    assert (
        llm.complete(contents[0]).raw["slots"]
        < llm.complete(read(CompressedContextPostprocessor(compressor), scored())[0]).raw["slots"]
    )

    class TooFew(Policy):
        def choose(self, retrieved):
            return [Form("text")]

    with pytest.raises(ValueError, match="one Form for each of 4 passages"):
        CompressedContextPostprocessor(compressor, policy=TooFew()).postprocess_nodes(scored())


def test_images_stay_where_they_are(compressor, llm, events):
    image = NodeWithScore(node=ImageNode(text="a picture", image_path="x.png"))
    nodes = [scored()[0], image, *scored()[1:3]]
    out = CompressedContextPostprocessor(compressor, policy=TextForTop(1)).postprocess_nodes(nodes)
    assert out[1].node is image.node
    assert [n.node.text for n in out] == [n.node.text for n in nodes]
    assert (compression(events).passages, compression(events).as_text, compression(events).fallbacks) == (2, 2, 0)


def test_settings_survive_json(compressor):
    policies = [TextForTop(2), TextAbove(0.5), TokenBudget(100), AutoBudget(100, [8, 2]), AutoBudget(7)]
    policies += [ScoreBudget(50, temperature=0.5, lowest=2, highest=32)]
    for policy in policies:
        post = CompressedContextPostprocessor(compressor, policy=policy, ratio=3, keep_metadata=True, fallback=True)
        data = json.loads(json.dumps(post.to_dict()))
        again = CompressedContextPostprocessor.from_dict(data, compressor=compressor)
        assert again.to_dict() == data
        assert again._policy == policy
        assert (again.ratio, again.keep_metadata, again.fallback) == (3, True, True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextForTop(-1), "k must be an integer of at least 0"),
        (lambda: TextForTop(1.5), "k must be an integer"),
        (lambda: TextAbove(float("nan")), "score"),
        (lambda: TokenBudget(0), "n must be an integer of at least 1"),
        (lambda: TokenBudget(True), "n must be an integer"),
        (lambda: ScoreBudget(0), "n must be an integer of at least 1"),
        (lambda: ScoreBudget(10, temperature=0), "temperature > 0"),
        (lambda: ScoreBudget(10, lowest=8, highest=4), "lowest <= highest"),
        (lambda: AutoBudget(10, ratios=()), "at least 1"),
        (lambda: AutoBudget(10, ratios=(0.5,)), "at least 1"),
        (lambda: AutoBudget(10, ratios="48"), "a list of compression ratios"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("policy", [5, "TokenBudget", TokenBudget, {"policy": "Unknown"}])
def test_what_is_no_policy_is_refused(compressor, policy):
    with pytest.raises(TypeError, match="policy must be TextForTop"):
        CompressedContextPostprocessor(compressor, policy=policy)
