"""Every engine of LlamaIndex that an LLM and a postprocessor can stand in; what cannot work is refused with a sentence."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
import torch
from fakes import Identity
from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, Node, NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from nutgraf import Reader, make_compressor
from nutgraf.adapters.llama_index import (
    CompressedCitationQueryEngine,
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressedTextNode,
    CompressionEvent,
    PassageCache,
    PassageScores,
    PlaceholderStore,
    ReaderRefusedError,
    TextForTop,
)
from nutgraf.compressors.reader.generation import _Written
from texts import DELEGATES, QUESTION
from transformers import LogitsProcessor, LogitsProcessorList

TEXTS = DELEGATES[:3]


@pytest.fixture
def compressor(reader) -> Identity:
    return Identity(reader)


@pytest.fixture(scope="module")
def llm(reader) -> CompressedContextLLM:
    return CompressedContextLLM(reader, max_new_tokens=3)


def ways(index: VectorStoreIndex, compressor: Any) -> list[dict[str, Any]]:
    """The retriever with text, and with compressed passages."""
    retriever = index.as_retriever(similarity_top_k=len(TEXTS))
    posts = [[], [CompressedContextPostprocessor(compressor)]]
    return [{"retriever": retriever, "node_postprocessors": post} for post in posts]


def texts_of(response: Any) -> list[str]:
    return [source.node.get_content() for source in response.source_nodes]


def raws(events: list[Any]) -> list[dict[str, Any]]:
    ends = ("LLMCompletionEndEvent", "LLMChatEndEvent")
    return [e.response.raw for e in events if type(e).__name__ in ends and e.response is not None]


# LlamaIndex's own puts spaces before the context, which become a part of a text's first token.
CONTEXT_PROMPT = "Documents:\n{context_str}\nAnswer in brief.\n"


# -- engines -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
def test_chat_engines_hold_the_same_conversation(reader, compressor, index, events, kind, chat):
    llm = CompressedContextLLM(reader, max_new_tokens=3, chat=chat)
    conversations = []
    for way in ways(index, compressor):
        engine = kind.from_defaults(llm=llm, system_prompt="Be brief.", context_prompt=CONTEXT_PROMPT, **way)
        first = engine.chat(QUESTION)
        streamed = engine.stream_chat("And where?")
        second = "".join(streamed.response_gen)
        assert texts_of(first) == texts_of(streamed) == TEXTS
        history = [m.content.strip() for m in engine.chat_history]
        assert history == [QUESTION, str(first).strip(), "And where?", second.strip()]
        conversations.append((str(first), second))
    assert conversations[0] == conversations[1]
    assert sorted({raw["passages"] for raw in raws(events)}) == [0, 3]
    assert set(compressor.asked) == set(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
async def test_chat_engines_in_an_event_loop(llm, compressor, index, kind):
    conversations = []
    for way in ways(index, compressor):
        engine = kind.from_defaults(llm=llm, context_prompt=CONTEXT_PROMPT, **way)
        first = await engine.achat(QUESTION)
        streamed = await engine.astream_chat("And where?")
        second = "".join([piece async for piece in streamed.async_response_gen()])
        conversations.append((str(first), second))
    assert conversations[0] == conversations[1]
    assert compressor.asked


async def test_the_retriever_query_engine(llm, compressor, index):
    answers = []
    for way in ways(index, compressor):
        engine = RetrieverQueryEngine.from_args(llm=llm, response_synthesizer=llm.response_synthesizer(), **way)
        answers += [str(engine.query(QUESTION)), str(await engine.aquery(QUESTION))]
    assert len(set(answers)) == 1
    assert len(compressor.asked) == len(TEXTS)


async def test_citations_number_compressed_sources_and_keep_their_text(llm, compressor, index, events):
    text, compressed = ways(index, compressor)
    plain = CitationQueryEngine.from_args(index, llm=llm, **text)
    ours = CompressedCitationQueryEngine.from_args(index, llm=llm, **compressed)
    wanted, found, later = plain.query(QUESTION), ours.query(QUESTION), await ours.aquery(QUESTION)
    assert str(wanted) == str(found) == str(later)
    assert texts_of(wanted) == texts_of(found) == [f"Source {i + 1}:\n{t}\n" for i, t in enumerate(TEXTS)]
    assert [source.node.node_id for source in found.source_nodes] == [f"node-{i}" for i in range(3)]
    before, after = raws(events)[:2]
    assert (before["passages"], after["passages"]) == (0, 3)
    assert before["reader_tokens"] == after["reader_tokens"]
    mixed = [CompressedContextPostprocessor(compressor, policy=TextForTop(1))]
    some = CompressedCitationQueryEngine.from_args(index, llm=llm, **{**compressed, "node_postprocessors": mixed})
    assert str(some.query(QUESTION)) == str(wanted)
    assert raws(events)[-1]["passages"] == 2
    with pytest.raises(ValueError, match="multimodal"):
        CompressedCitationQueryEngine.from_args(
            index, llm=CompressedContextLLM(llm._reader, chat=True), multimodal=True, **compressed
        ).query(QUESTION)


async def test_a_workflow_calls_the_query_engine(llm, compressor, index):
    class Asked(Event):
        question: str

    class Asking(Workflow):
        engine: Any = None

        @step
        async def ask(self, ctx: Context, start: StartEvent) -> Asked:
            return Asked(question=start.question)

        @step
        async def answer(self, ctx: Context, asked: Asked) -> StopEvent:
            return StopEvent(result=await self.engine.aquery(asked.question))

    answers = []
    for way in ways(index, compressor):
        flow = Asking(timeout=60)
        flow.engine = RetrieverQueryEngine.from_args(llm=llm, **way)
        answers.append(str(await flow.run(question=QUESTION)))
    assert answers[0] == answers[1]
    assert compressor.asked


class Script(LogitsProcessor):
    """Makes a random reader say given answers, one after another."""

    def __init__(self, reader: Reader, answers: list[str]) -> None:
        self.ids = [i for answer in answers for i in [*reader.tokenize(answer), reader.eos_id]]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids.pop(0)] = 0
        return forced


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_react_agent_asks_through_a_tool(reader, llm, compressor, index, events, streaming):
    script = Script(
        reader,
        [
            'Thought: I need a tool\nAction: library\nAction Input: {"input": "Who signed it?"}\n',
            "Thought: I can answer.\nAnswer: a delegate",
        ],
    )
    talking = CompressedContextLLM(
        reader, max_new_tokens=100, generation_kwargs={"logits_processor": LogitsProcessorList([script])}
    )
    engine = RetrieverQueryEngine.from_args(llm=llm, **ways(index, compressor)[1])
    tool = QueryEngineTool.from_defaults(engine, name="library", description="Knows treaties.")
    agent = ReActAgent(tools=[tool], llm=talking, streaming=streaming)
    result = await agent.run("Who signed the treaty?")
    assert str(result.response.content) == "a delegate"
    (call,) = result.tool_calls
    assert call.tool_output.raw_output.source_nodes[0].node.get_content() == TEXTS[0]
    assert compressor.asked == TEXTS
    assert 3 in [raw["passages"] for raw in raws(events)]


# -- scores per passage --------------------------------------------------------------------------------------------------


async def test_scores_are_log_likelihoods_with_each_passage_alone(reader, llm, compressor, index):
    prompt = "Context information is below.\n---------------------\n{}\n---------------------\n"
    prompt += "Given the context information and not prior knowledge, answer the query.\n"
    prompt += f"Query: {QUESTION}\nAnswer: "
    posts = [CompressedContextPostprocessor(compressor)]
    engine = index.as_query_engine(
        llm=llm, response_synthesizer=PassageScores(llm), node_postprocessors=posts, similarity_top_k=3
    )
    response = engine.query(QUESTION)
    plain = index.as_query_engine(llm=llm, node_postprocessors=posts, similarity_top_k=3).query(QUESTION)
    assert str(response) == str(plain)
    answer = reader.tokenize(str(response))

    def loglik(context: str) -> float:
        logits = reader.target_logits([prompt.format(context)], [str(response)])[0]
        return float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())

    for source, text in zip(response.source_nodes, TEXTS):
        facts = response.metadata[source.node.node_id]
        assert facts["answer_logprob"] == pytest.approx(loglik(text), abs=1e-3)
        assert facts["answer_logprob_gain"] == pytest.approx(loglik(text) - loglik(""), abs=1e-3)
        assert source.node.metadata == {}
    assert (await engine.aquery(QUESTION)).metadata == response.metadata
    assert len({facts["answer_logprob"] for facts in response.metadata.values()}) == 3


def test_scores_for_chat_readers_and_refusals(reader, index, compressor):
    llm = CompressedContextLLM(reader, max_new_tokens=3, chat=True)
    engine = index.as_query_engine(llm=llm, response_synthesizer=PassageScores(llm, "tree_summarize"))
    facts = engine.query(QUESTION).metadata
    assert all(numbers["answer_logprob"] < 0 for numbers in facts.values())
    assert PassageScores(llm).synthesize(QUESTION, []).metadata is None
    with pytest.raises(TypeError, match="CompressedContextLLM"):
        PassageScores(reader)
    with pytest.raises(ValueError, match="cannot stream"):
        PassageScores(llm, streaming=True)
    with pytest.raises(ReaderRefusedError, match="empty"):
        llm.answer_logprobs(["x"], "")


# -- readers -------------------------------------------------------------------------------------------------------------


def test_kv_passages_are_read_by_the_reader_that_was_tuned_for_them(reader, llm, index, events):
    compressor = make_compressor("gist", reader, n_gist=4).eval()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    posts = [CompressedContextPostprocessor(compressor, ratio=4)]
    with pytest.raises(ValueError, match=r"build the LLM with CompressedContextLLM\(compressor\.reader\)"):
        index.as_query_engine(llm=llm, node_postprocessors=posts).query(QUESTION)
    tuned = CompressedContextLLM(compressor.reader, max_new_tokens=3)
    engine = index.as_query_engine(llm=tuned, node_postprocessors=posts, similarity_top_k=3)
    answer = str(engine.query(QUESTION))
    raw = raws(events)[-1]
    assert raw["passages"] == 3
    assert raw["slots"] < raw["source_tokens"] / 2
    passages = compressor.compress(TEXTS, ratio=4)
    joined = [piece for passage in passages for piece in (passage, "\n\n")][:-1]
    prompt = ["Context information is below.\n---------------------\n", *joined, "\n---------------------\n"]
    prompt += ["Given the context information and not prior knowledge, answer the query.\n"]
    prompt += [f"Query: {QUESTION}\nAnswer: "]
    assert answer == compressor.reader.generate([prompt], 3)[0]


def test_a_reader_loaded_with_a_device_map(reader, zoo, tmp_path, index):
    reader.model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    mapped = Reader.from_pretrained(tmp_path, device_map="cpu")
    assert mapped.fingerprint == reader.fingerprint
    wanted = CompressedContextLLM(reader, max_new_tokens=3)
    llm = CompressedContextLLM(mapped, max_new_tokens=3)
    compressor = make_compressor("icae", mapped, mem_size=8).eval()
    posts = [CompressedContextPostprocessor(compressor)]
    answers = [
        str(index.as_query_engine(llm=reading, node_postprocessors=posts).query(QUESTION)) for reading in (llm, wanted)
    ]
    assert answers[0] == answers[1]


def state_space(zoo: Any, name: str, **settings: Any) -> Reader:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return Reader.from_pretrained(model.eval(), tokenizer=zoo.tokenizer())


def test_state_space_readers_that_would_misread_are_refused(zoo):
    rwkv = state_space(zoo, "rwkv", attention_hidden_size=32, intermediate_size=64)
    with pytest.raises(ValueError, match="state-space model that does not read embeddings in a padded batch"):
        CompressedContextLLM(rwkv)


def test_state_space_readers_that_read_embeddings_may_be_used(zoo, index):
    mamba = state_space(zoo, "mamba", state_size=8)
    llm = CompressedContextLLM(mamba, max_new_tokens=3)
    compressor = Identity(mamba)
    answers = [str(RetrieverQueryEngine.from_args(llm=llm, **way).query(QUESTION)) for way in ways(index, compressor)]
    assert answers[0] == answers[1]
    assert compressor.asked


@pytest.mark.parametrize("method", ["gist", "500x"])
def test_state_space_readers_have_no_keys_and_values(zoo, method):
    with pytest.raises(ValueError, match=r"MambaForCausalLM is a state-space model.* use an embeds method"):
        make_compressor(method, state_space(zoo, "mamba", state_size=8))


# -- what nobody may type ------------------------------------------------------------------------------------------------


def foreign(reader: Reader) -> tuple[PlaceholderStore, str]:
    """Another store's valid placeholder."""
    store = PlaceholderStore()
    return store, store.issue([reader.identity("4711 is the combination of the safe")])[0]


def test_another_stores_placeholder_opens_nothing(reader, llm, compressor, events, make_index):
    store, copy = foreign(reader)
    assert llm.complete(copy).raw["passages"] == 1  # it is valid
    index = make_index([f"1648 {copy} x", *TEXTS[:2]])
    for k in (0, 3):
        posts = [CompressedContextPostprocessor(compressor, policy=TextForTop(k))]
        events.clear()
        response = index.as_query_engine(llm=llm, node_postprocessors=posts, similarity_top_k=3).query(QUESTION)
        assert raws(events)[0]["passages"] == 3 - k
        assert copy in response.source_nodes[0].node.get_content()
    engine = ContextChatEngine.from_defaults(llm=llm, **ways(make_index(TEXTS), compressor)[1])
    with pytest.raises(ValueError, match="question contains a placeholder"):
        engine.chat(f"What is {copy}?")
    assert store is not None


def test_forged_placeholders_in_a_chat_history_stay_text(reader, llm, compressor, index, events):
    store, copy = foreign(reader)
    head, tag = copy[:-2].rsplit(":", 1)
    forged = [f"{head}:{'A' * len(tag)}]]", copy.replace(store.name, "0" * 8), head.replace("-0:", "-1:") + f":{tag}]]"]
    history = [ChatMessage(content=f"It was {text}.") for text in forged]
    engine = ContextChatEngine.from_defaults(llm=llm, **ways(index, compressor)[1])
    engine.chat(QUESTION, chat_history=history)
    assert raws(events)[-1]["passages"] == 3  # the context's own
    assert raws(events)[-1]["reader_tokens"] > sum(len(reader.tokenize(text)) for text in forged)


# -- faults and what the pipeline is told --------------------------------------------------------------------------------


def compression(events: list[Any]) -> list[CompressionEvent]:
    return [event for event in events if isinstance(event, CompressionEvent)]


def test_a_passage_that_cannot_be_compressed(reader, llm, compressor, events, caplog):
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in (TEXTS[0], "a bad passage", "")]
    with pytest.raises(RuntimeError, match="out of order"):
        CompressedContextPostprocessor(compressor).postprocess_nodes(nodes)
    events.clear()
    with caplog.at_level(logging.WARNING):
        out = CompressedContextPostprocessor(compressor, fallback=True).postprocess_nodes(nodes)
    contents = [n.node.get_content(MetadataMode.LLM) for n in out]
    assert contents[0].startswith("[[nutgraf:")
    assert contents[1:] == ["a bad passage", ""]
    assert "could not be compressed: the model is out of order" in caplog.text
    (event,) = compression(events)
    assert (event.passages, event.fallbacks, event.as_text, event.compressed) == (2, 1, 1, 2)
    assert event.slots == event.source_tokens == len(reader.tokenize(TEXTS[0]))
    assert event.ms > 0


def test_a_passage_without_room_may_be_text_that_is_split(zoo, events, make_index):
    reader = zoo.reader("llama", seed=3, num_hidden_layers=1)
    compressor = Identity(reader)
    index = make_index(["1648 " + "peace " * 800])
    llm = CompressedContextLLM(reader, max_new_tokens=4, context_window=1500)
    posts = [CompressedContextPostprocessor(compressor, fallback=True)]
    synthesizer = llm.response_synthesizer()
    assert str(index.as_query_engine(llm=llm, response_synthesizer=synthesizer, node_postprocessors=posts).query("x"))
    assert len(raws(events)) > 1
    assert compression(events)[0].fallbacks == 1


def test_cache_hits_are_counted(llm, compressor, index, events):
    posts = [CompressedContextPostprocessor(compressor, cache=PassageCache())]
    engine = index.as_query_engine(llm=llm, node_postprocessors=posts, similarity_top_k=3)
    engine.query(QUESTION)
    engine.query(QUESTION)
    assert [(e.compressed, e.cache_hits) for e in compression(events)] == [(3, 0), (0, 3)]


def test_nodes_without_text_are_no_passages_to_the_reader(llm, compressor, events):
    nodes = [NodeWithScore(node=node) for node in (TextNode(text=""), Node(id_="bare"), TextNode(text=TEXTS[0]))]
    out = CompressedContextPostprocessor(compressor).postprocess_nodes(nodes)
    contents = [n.node.get_content(MetadataMode.LLM) for n in out]
    assert contents[:2] == ["", ""]
    assert llm.complete("\n\n".join(contents)).raw["passages"] == 1


def test_pipelines_survive_json(reader, llm, compressor):
    settings = CompressedContextLLM(
        reader, max_new_tokens=7, context_window=300, chat=True, stop=["\n"], generation_kwargs={"do_sample": False}
    )
    data = json.loads(json.dumps(settings.to_dict()))
    again = CompressedContextLLM.from_dict(data, reader=reader)
    assert again.to_dict() == settings.to_dict()
    assert again.complete("The treaty").text == settings.complete("The treaty").text
    (out,) = CompressedContextPostprocessor(compressor).postprocess_nodes([NodeWithScore(node=TextNode(text=TEXTS[0]))])
    revived = CompressedTextNode.from_dict(json.loads(json.dumps(out.node.to_dict())))
    assert (revived.model_dump(), revived.hash) == (out.node.model_dump(), out.node.hash)
    assert llm.complete(revived.get_content(MetadataMode.LLM)).raw["passages"] == 1


async def test_the_event_loop_ticks_while_the_reader_runs(reader):
    """Every async form of the LLM lets other tasks run: they go on while the reader is held up."""
    ticks = 0
    held: list[int] = []

    class Held(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen, waited = ticks, 0
            while ticks < seen + 3 and (waited := waited + 1) < 5000:
                time.sleep(0.001)
            held.append(ticks - seen)
            return scores

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    llm = CompressedContextLLM(
        reader, max_new_tokens=2, generation_kwargs={"logits_processor": LogitsProcessorList([Held()])}
    )
    message = [ChatMessage(content="The treaty")]
    ticking = asyncio.create_task(tick())
    try:
        await llm.acomplete("The treaty")
        await llm.achat(message)
        assert [piece async for piece in await llm.astream_complete("The treaty")]
        assert [piece async for piece in await llm.astream_chat(message)]
    finally:
        ticking.cancel()
    assert len(held) >= 4
    assert min(held) >= 3


def test_a_stream_decodes_its_end_alone(reader):
    asked: list[int] = []

    def decode(ids: list[int]) -> str:
        asked.append(len(ids))
        return reader.decode(ids)

    generator = torch.Generator().manual_seed(0)
    text = "naïve—日本語 🦊 was signed in 1648. " * 20
    for ids in (reader.tokenize(text), torch.randint(7, reader.vocab_size, (400,), generator=generator).tolist()):
        written = _Written(decode)
        for n, token in enumerate(ids, start=1):
            written.add(token)
            assert written.text == reader.decode(ids[:n])
    assert max(asked) <= 100
