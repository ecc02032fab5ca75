"""Compressed passages in LlamaIndex query engines: with a passage's own embeddings as its slots nothing may change."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from fakes import FakeConfig, FirstWords, Identity
from llama_index.core import Document, PromptTemplate, Settings
from llama_index.core.llms import MockLLM
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressedTextNode,
    CompressionEvent,
    PassageCache,
    PlaceholderError,
    PlaceholderStore,
    TextForTop,
    escape_placeholders,
)
from texts import DELEGATES, QUESTION

MODES = ["compact", "refine", "simple_summarize", "tree_summarize", "accumulate", "compact_accumulate"]
TEXTS = DELEGATES[:3]


@pytest.fixture
def compressor(reader) -> Identity:
    return Identity(reader)


@pytest.fixture
def seen(reader, monkeypatch) -> list[torch.Tensor]:
    """The embeddings ``[time, width]`` of every prompt the reader gets: its token ids and positions in one."""
    prompts: list[torch.Tensor] = []
    generate = reader.model.generate

    def record(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else reader.embed(kwargs["input_ids"])
        prompts.extend(row[mask.bool()] for row, mask in zip(embeds, kwargs["attention_mask"]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(reader.model, "generate", record)
    return prompts


def make_engine(index, llm, compressor=None, mode="compact", **kwargs):
    posts = [] if compressor is None else [CompressedContextPostprocessor(compressor)]
    return index.as_query_engine(
        llm=llm, node_postprocessors=posts, response_mode=mode, similarity_top_k=len(TEXTS), **kwargs
    )


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b))


# -- conformance ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("mode", MODES)
async def test_identity_slots_read_as_text_in_every_mode(reader, compressor, index, seen, mode, chat):
    llm = CompressedContextLLM(reader, max_new_tokens=2, chat=chat)
    # LlamaIndex's refine prompt for chat puts a space before the passage, which becomes a part of its first text token.
    refine = PromptTemplate("{existing_answer}\n{context_msg}\n{query_str}") if chat else None
    answers, prompts = [], []
    for compress in (None, compressor):
        engine = make_engine(index, llm, compress, mode, refine_template=refine)
        for ask in (engine.query, engine.aquery):
            answer = ask(QUESTION)
            answer = await answer if inspect.isawaitable(answer) else answer
            answers.append(str(answer))
            prompts.append(sorted(seen, key=lambda p: p.sum().item()))
            seen.clear()
            assert [n.node.text for n in answer.source_nodes] == TEXTS
    assert answers[0]
    assert len(set(answers)) == 1
    assert prompts[0]
    assert all(same(prompts[0], other) for other in prompts[1:])
    assert compressor.asked  # and the second engine did not read the text


@pytest.mark.parametrize("mode", ["compact", "refine", "simple_summarize", "tree_summarize"])
async def test_streaming_gives_the_same_answer(reader, compressor, index, mode):
    llm = CompressedContextLLM(reader, max_new_tokens=8)
    whole = str(make_engine(index, llm, compressor, mode).query(QUESTION))
    streamed = make_engine(index, llm, compressor, mode, streaming=True).query(QUESTION)
    assert "".join(streamed.response_gen) == whole
    streamed = await make_engine(index, llm, compressor, mode, streaming=True).aquery(QUESTION)
    assert "".join([piece async for piece in streamed.response_gen]) == whole


def test_a_passage_is_compressed_once_for_all_requests(reader, compressor, index):
    engine = make_engine(index, CompressedContextLLM(reader, max_new_tokens=2), compressor)
    engine.query(QUESTION)
    engine.query("And when?")
    assert compressor.asked == TEXTS
    make_engine(index, CompressedContextLLM(reader, max_new_tokens=2), compressor).query(QUESTION)
    assert len(compressor.asked) == len(TEXTS)  # engines of one reader share what is compressed


# -- what the pipeline sees ----------------------------------------------------------------------------------------------


def rich_node() -> TextNode:
    node = TextNode(id_="n", text=TEXTS[0], metadata={"title": "Peace"}, excluded_embed_metadata_keys=["title"])
    node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="doc")
    return node


def test_everything_but_the_llm_content_survives(reader, compressor):
    llm = CompressedContextLLM(reader)
    node = rich_node()
    before = node.model_dump()
    (out,) = CompressedContextPostprocessor(compressor).postprocess_nodes([NodeWithScore(node=node, score=0.25)])
    assert node.model_dump() == before
    assert out.score == 0.25
    assert out.node.node_id == "n"
    assert out.node.text == out.text == TEXTS[0]
    assert isinstance(out.node, TextNode)
    assert out.node.hash == node.hash
    assert str(out.node) == str(node)
    for mode in (MetadataMode.ALL, MetadataMode.EMBED, MetadataMode.NONE):
        assert out.node.get_content(mode) == node.get_content(mode)
    read = out.node.get_content(MetadataMode.LLM)
    assert TEXTS[0] not in read
    assert "Peace" not in read
    assert len(read) < 120
    assert [block.text for block in out.node.get_content_blocks(MetadataMode.LLM)] == [read]
    kept = {k: v for k, v in out.node.model_dump().items() if k not in ("llm_text", "class_name")}
    assert kept == {k: v for k, v in before.items() if k != "class_name"}
    out.node.metadata["new"] = 1
    assert "new" not in node.metadata
    assert llm.metadata.num_output == 256


def test_nodes_survive_json_in_this_process_and_give_text_in_another(reader, compressor, monkeypatch):
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    (out,) = CompressedContextPostprocessor(compressor).postprocess_nodes([NodeWithScore(node=rich_node(), score=1.0)])
    same_process = CompressedTextNode.model_validate_json(out.node.model_dump_json())
    assert same_process.get_content(MetadataMode.LLM) == out.node.get_content(MetadataMode.LLM)
    assert llm.complete(same_process.get_content(MetadataMode.LLM)).raw["passages"] == 1
    assert TextNode.from_dict(out.node.to_dict()).get_content(MetadataMode.LLM) == f"title: Peace\n\n{TEXTS[0]}"
    monkeypatch.setattr("nutgraf.adapters.placeholders.placeholder._STORES", {})
    assert same_process.get_content(MetadataMode.LLM) == f"title: Peace\n\n{TEXTS[0]}"
    assert NodeWithScore(node=same_process).model_dump_json()


def test_documents_and_index_nodes_keep_their_kind_and_images_are_left_alone(reader, compressor):
    llm = CompressedContextLLM(reader)
    nodes = [
        Document(text=TEXTS[0], id_="d"),
        IndexNode(text=TEXTS[1], index_id="target", id_="i"),
        ImageNode(text="a picture", image_path="x.png", id_="p"),
    ]
    out = CompressedContextPostprocessor(compressor).postprocess_nodes([NodeWithScore(node=n) for n in nodes])
    assert [n.node.node_id for n in out] == ["d", "i", "p"]
    assert out[0].node.get_content() == TEXTS[0]
    assert isinstance(out[0].node, Document)
    assert out[1].node.index_id == "target"
    for made, node in zip(out[:2], nodes):
        assert made.node.get_type() == node.get_type()
        assert type(node).from_dict(made.node.to_dict()).get_content() == node.get_content()
    assert out[2].node is nodes[2]
    assert TEXTS[0] not in out[0].node.get_content(MetadataMode.LLM)
    assert TEXTS[1] not in out[1].node.get_content(MetadataMode.LLM)
    assert llm.class_name() == "CompressedContextLLM"


def test_text_on_top_metadata_and_empty_passages(reader, compressor):
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    nodes = [NodeWithScore(node=TextNode(text=t, metadata={"page": i})) for i, t in enumerate([*TEXTS[:2], ""])]
    post = CompressedContextPostprocessor(compressor, policy=TextForTop(1), keep_metadata=True)
    out = [n.node.get_content(MetadataMode.LLM) for n in post.postprocess_nodes(nodes)]
    assert out[0] == f"page: 0\n\n{TEXTS[0]}"
    assert out[1].startswith("page: 1\n\n[[")
    assert out[2] == ""
    raw = llm.complete("\n\n".join(out)).raw
    assert raw["passages"] == 1
    assert raw["slots"] == raw["source_tokens"] == len(reader.tokenize(TEXTS[1]))
    assert raw["reader_tokens"] > raw["slots"]
    assert 0 < raw["ttft_ms"] <= raw["ms"]


def test_compression_is_an_event(reader, compressor, index, events):
    engine = make_engine(index, CompressedContextLLM(reader, max_new_tokens=2), compressor)
    engine.query(QUESTION)
    engine.query(QUESTION)
    first, second = (e for e in events if isinstance(e, CompressionEvent))
    assert (first.passages, first.compressed) == (3, 3)
    assert first.slots == first.source_tokens > 0
    assert (second.passages, second.compressed) == (3, 0)
    ends = [e.response.raw for e in events if type(e).__name__ == "LLMCompletionEndEvent"]
    assert [raw["passages"] for raw in ends] == [3, 3]


def test_queries_and_vectors_reach_the_compressor_only_if_asked(reader, compressor):
    llm = CompressedContextLLM(reader)
    nodes = [NodeWithScore(node=TextNode(text=t, embedding=e)) for t, e in zip(TEXTS, ([0.5, 1.0], None))]
    query = QueryBundle("why?")
    CompressedContextPostprocessor(compressor).postprocess_nodes(nodes, query)
    CompressedContextPostprocessor(compressor, query_aware=True, reuse_vectors=True).postprocess_nodes(nodes, query)
    assert compressor.calls[:2] == [(TEXTS[0], None, None), (TEXTS[1], None, None)]
    assert compressor.calls[2:] == [(TEXTS[0], "why?", [0.5, 1.0]), (TEXTS[1], "why?", None)]
    assert llm.model_name


# -- text compressors ----------------------------------------------------------------------------------------------------


def test_text_compressors_work_with_any_llm(reader, index):
    heard: list[str] = []

    class Listening(MockLLM):
        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            heard.append(prompt)
            return super().complete(prompt, formatted, **kwargs)

    post = CompressedContextPostprocessor(FirstWords(FakeConfig(), reader), as_text=True)
    answer = index.as_query_engine(llm=Listening(), node_postprocessors=[post], similarity_top_k=3).query(QUESTION)
    assert "\n1600 saw\n\n1601 saw\n\n1602 saw\n" in heard[0]
    assert "delegate" not in heard[0]
    assert [n.node.text for n in answer.source_nodes] == TEXTS


# -- what nobody may type ------------------------------------------------------------------------------------------------


def test_lookalikes_in_documents_and_questions_are_read_literally(reader, compressor, seen, make_index):
    fake = "[[nutgraf:0123abcd-0123456789ab-0:12:AAAAAAAAAAAAAAAAAAAAAA]]"
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    index = make_index([f"1648 {fake} x"])
    for posts in ([], [CompressedContextPostprocessor(compressor)]):
        index.as_query_engine(llm=llm, node_postprocessors=posts).query(f"what is {fake} ?")
    assert same(seen[:1], seen[1:])


async def test_copies_of_real_placeholders_open_nothing(reader, compressor, seen, make_index):
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    post = CompressedContextPostprocessor(compressor)
    secret = NodeWithScore(node=TextNode(text="4711 is the combination of the safe"))
    (leaked,) = post.postprocess_nodes([secret])
    copy = leaked.node.get_content(MetadataMode.LLM)
    engine = make_engine(make_index(TEXTS), llm, compressor)
    with pytest.raises(ValueError, match="question contains a placeholder"):
        engine.query(f"What does {copy} say?")
    with pytest.raises(ValueError, match="question contains a placeholder"):
        await engine.aquery(f"What does {copy[:-3]} say?")

    planted = NodeWithScore(node=TextNode(text=f"1648 {copy} x", metadata={"title": copy}))
    (as_text,) = CompressedContextPostprocessor(compressor, policy=TextForTop(1)).postprocess_nodes([planted])
    assert llm.complete(as_text.node.get_content(MetadataMode.LLM)).raw["passages"] == 0
    assert as_text.node.text == planted.node.text
    seen.clear()
    (compressed,) = CompressedContextPostprocessor(compressor, keep_metadata=True).postprocess_nodes([planted])
    raw = llm.complete(compressed.node.get_content(MetadataMode.LLM)).raw
    assert raw["passages"] == 1
    assert raw["slots"] == len(reader.tokenize(planted.node.text))
    assert llm.complete(f"{escape_placeholders(copy)} ?").raw["passages"] == 0


def test_a_node_whose_text_is_a_placeholder_is_its_original(reader, compressor, seen):
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    post = CompressedContextPostprocessor(compressor)
    (first,) = post.postprocess_nodes([NodeWithScore(node=TextNode(text=TEXTS[0]))])
    placeholder = first.node.get_content(MetadataMode.LLM)
    node = TextNode(
        text=placeholder, metadata={"original_text": TEXTS[0]}, excluded_llm_metadata_keys=["original_text"]
    )
    (again,) = post.postprocess_nodes([NodeWithScore(node=node)])
    assert llm.complete(again.node.get_content(MetadataMode.LLM)).raw["slots"] == len(reader.tokenize(TEXTS[0]))
    (as_text,) = CompressedContextPostprocessor(compressor, policy=TextForTop(1)).postprocess_nodes(
        [NodeWithScore(node=node)]
    )
    assert as_text.node.get_content(MetadataMode.LLM) == TEXTS[0]
    with pytest.raises(PlaceholderError, match="compressed before"):
        post.postprocess_nodes([NodeWithScore(node=TextNode(text=placeholder))])
    (twice,) = post.postprocess_nodes([first])
    assert twice.node.text == TEXTS[0]
    assert compressor.asked == TEXTS[:1]


def test_nodes_and_responses_are_copied(reader, compressor, index):
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    response = make_engine(index, llm, compressor).query(QUESTION)
    for copy_ in (copy.deepcopy(response), copy.copy(response)):
        assert str(copy_) == str(response)
        assert [n.node.text for n in copy_.source_nodes] == [n.node.text for n in response.source_nodes]
        read = [n.node.get_content(MetadataMode.LLM) for n in copy_.source_nodes]
        assert llm.complete("\n".join(read)).raw["passages"] == 3
    (node, *_) = response.source_nodes
    assert copy.deepcopy(node).node._placeholders is node.node._placeholders
    assert pickle.loads(pickle.dumps(node)).node.get_content(MetadataMode.LLM) == node.node.get_content(
        MetadataMode.LLM
    )
    assert node.model_copy(deep=True).node.text == node.node.text


# -- what cannot be read is refused, not garbled -------------------------------------------------------------------------


def test_passages_that_the_cache_could_not_keep_are_read(reader, compressor, index):
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    want = str(make_engine(index, llm).query(QUESTION))
    post = CompressedContextPostprocessor(compressor, cache=PassageCache(max_passages=1))
    got = index.as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=3).query(QUESTION)
    assert str(got) == want
    assert len(compressor.asked) == 3, "reading compresses nothing"
    assert post.cache.stats.evictions == 2


def test_a_placeholder_that_has_expired_is_an_error_in_every_mode(reader, compressor, index):
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    post = CompressedContextPostprocessor(compressor, placeholders=PlaceholderStore(max_age=1e-9))
    for mode in MODES:  # refine and compact would answer "Empty Response" to a ValueError
        engine = index.as_query_engine(llm=llm, node_postprocessors=[post], response_mode=mode)
        with pytest.raises(PlaceholderError, match="expired"):
            engine.query(QUESTION)


def test_another_reader_is_refused(reader, index, zoo):
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    compressor = Identity(zoo.reader("llama", seed=1))
    with pytest.raises(ValueError, match="No CompressedContextLLM reads"):
        make_engine(index, llm, compressor).query(QUESTION)
    right = CompressedContextLLM(compressor.reader, max_new_tokens=4)
    with pytest.raises(PlaceholderError, match="same reader"):
        make_engine(index, llm, compressor).query(QUESTION)
    assert str(make_engine(index, right, compressor).query(QUESTION))


def test_a_passage_larger_than_the_window_is_refused(zoo, make_index):
    reader = zoo.reader("llama", seed=2)  # one that no other LLM reads with
    compressor = Identity(reader)
    index = make_index(["1648 " + "peace " * 800])
    llm = CompressedContextLLM(reader, max_new_tokens=16, context_window=700)
    with pytest.raises(ValueError, match=r"Node node-0 takes \d+ positions"):
        index.as_query_engine(llm=llm, node_postprocessors=[CompressedContextPostprocessor(compressor)]).query("x")


def test_as_text_and_bad_arguments_are_refused(reader, compressor):
    with pytest.raises(ValueError, match="needs a compressor to text"):
        CompressedContextPostprocessor(compressor, as_text=True)
    with pytest.raises(TypeError, match="nutgraf compressor"):
        CompressedContextPostprocessor(reader)
    with pytest.raises(ValueError, match="ratio"):
        CompressedContextPostprocessor(compressor, ratio=0.5)


# -- many at once --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_64_queries_at_once_give_the_serial_answers(reader, compressor, index):
    questions = [f"Who signed in {1600 + i}?" for i in range(64)]
    engine = make_engine(index, CompressedContextLLM(reader, max_new_tokens=2), compressor)
    serial = [str(engine.query(q)) for q in questions]
    compressor.asked.clear()
    fresh = CompressedContextPostprocessor(compressor, cache=PassageCache())
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    engine = index.as_query_engine(llm=llm, node_postprocessors=[fresh], similarity_top_k=3)
    together = await asyncio.gather(*(engine.aquery(q) for q in questions))
    assert [str(answer) for answer in together] == serial
    assert len(compressor.asked) == len(TEXTS)


async def test_the_event_loop_is_never_blocked(reader, index, monkeypatch):
    """Compressor and reader wait for something that only the event loop can do."""
    loop_ran = threading.Event()
    waits: list[bool] = []

    def wait() -> None:
        loop_ran.clear()
        waits.append(loop_ran.wait(10))

    class Waiting(Identity):
        def encode(self, *args: Any, **kwargs: Any):
            wait()
            return super().encode(*args, **kwargs)

    async def tick() -> None:
        while True:
            loop_ran.set()
            await asyncio.sleep(0.01)

    plan = reader.plan
    monkeypatch.setattr(reader, "plan", lambda *args, **kwargs: (wait(), plan(*args, **kwargs))[1])
    ticking = asyncio.create_task(tick())
    try:
        for chat in (False, True):
            llm = CompressedContextLLM(reader, max_new_tokens=2, chat=chat)
            post = CompressedContextPostprocessor(Waiting(reader), cache=PassageCache())
            engine = index.as_query_engine(llm=llm, node_postprocessors=[post])
            await engine.aquery(QUESTION)
            streaming = index.as_query_engine(llm=llm, node_postprocessors=[post], streaming=True)
            assert [piece async for piece in (await streaming.aquery(QUESTION)).response_gen]
    finally:
        ticking.cancel()
    assert len(waits) >= 6
    assert all(waits)


def test_settings_may_hold_the_prompt_helper(zoo, make_index, monkeypatch, events):
    """The third line, in its other form: the window is filled by slots, and not by how long placeholders are as text."""
    reader = zoo.reader("llama", num_hidden_layers=1, seed=6)
    llm = CompressedContextLLM(reader, max_new_tokens=2, context_window=900)
    compressor, calls = Identity(reader), []
    index = make_index(["the"] * 24)  # fewer slots than a placeholder has tokens
    for helper in (None, llm.prompt_helper()):
        monkeypatch.setattr(Settings, "_prompt_helper", helper)
        engine = index.as_query_engine(
            llm=llm, node_postprocessors=[CompressedContextPostprocessor(compressor)], similarity_top_k=24
        )
        events.clear()
        engine.query(QUESTION)
        calls.append(sum(type(event).__name__ == "LLMCompletionEndEvent" for event in events))
    assert calls[0] > calls[1] == 1


def test_settings_llm_is_not_needed(reader, compressor, index):
    Settings._llm = None  # nothing may fall back to a hosted model
    engine = make_engine(index, CompressedContextLLM(reader, max_new_tokens=2), compressor)
    assert str(engine.query(QUESTION))
    assert Settings._llm is None
