"""LangChain, end to end: documents are compressed, a chain puts them into a prompt, a reader answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from nutgraf import make_compressor
from nutgraf.adapters.placeholders.placeholder import MARKER, PlaceholderError
from texts import CURIE, QUESTION, TREATY
from transformers import LogitsProcessor, LogitsProcessorList

pytest.importorskip("langchain_core")
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    SystemMessageChunk,
    ToolMessage,
    ToolMessageChunk,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from nutgraf.adapters.langchain import (
    CompressedContextChatModel,
    CompressedContextDocumentCompressor,
    CompressedContextLLM,
)

TEXTS = [TREATY, CURIE]


@pytest.fixture(scope="module")
def compressor(reader) -> Any:
    return make_compressor("mean-pool", reader, encoder="embeddings")


@pytest.fixture
def documents() -> list[Document]:
    return [Document(page_content=text, metadata={"n": i}, id=str(i)) for i, text in enumerate(TEXTS)]


def chain(documents: list[Document], shorten: CompressedContextDocumentCompressor, prompt: Any, llm: Any) -> Any:
    def context(question: str) -> str:
        return "\n\n".join(d.page_content for d in shorten.compress_documents(documents, question))

    return {"context": RunnableLambda(context), "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()


async def test_a_chain_reads_compressed_passages(reader, compressor, documents):
    shorten = CompressedContextDocumentCompressor(compressor, ratio=4)
    first, second = compressor.compress(TEXTS, ratio=4)
    wanted = reader.generate([[first, "\n\n", second, f"\nQuestion: {QUESTION}\nAnswer:"]], 12)[0]
    as_text = reader.generate([f"{TEXTS[0]}\n\n{TEXTS[1]}\nQuestion: {QUESTION}\nAnswer:"], 12)[0]
    assert wanted != as_text
    prompt = PromptTemplate.from_template("{context}\nQuestion: {question}\nAnswer:")
    rag = chain(documents, shorten, prompt, CompressedContextLLM(reader=reader, max_new_tokens=12))
    assert rag.invoke(QUESTION) == wanted
    assert "".join(rag.stream(QUESTION)) == wanted
    assert await rag.ainvoke(QUESTION) == wanted
    assert [d.page_content for d in documents] == TEXTS


def test_a_chat_chain_reads_compressed_passages(reader, compressor, documents):
    shorten = CompressedContextDocumentCompressor(compressor, ratio=4)
    first, second = compressor.compress(TEXTS, ratio=4)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [first, "\n\n", second, f"\n{QUESTION}"]},
    ]
    wanted = reader.generate([messages], 12, chat=True)[0]
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{context}\n{question}")])
    rag = chain(documents, shorten, prompt, CompressedContextChatModel(reader=reader, max_new_tokens=12))
    assert rag.invoke(QUESTION) == wanted
    assert "".join(rag.stream(QUESTION)) == wanted


def test_documents_keep_who_they_are(compressor, documents):
    found = CompressedContextDocumentCompressor(compressor, ratio=4).compress_documents(documents, QUESTION)
    assert [d.metadata for d in found] == [{"n": i, "original_text": t} for i, t in enumerate(TEXTS)]
    assert [d.id for d in found] == ["0", "1"]
    assert all(d.page_content.startswith(MARKER) for d in found)
    again = CompressedContextDocumentCompressor(compressor, ratio=4).compress_documents(documents, QUESTION)
    assert {d.page_content for d in again}.isdisjoint({d.page_content for d in found}), "each request has its own"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean-pool", "selective-context"])
@pytest.mark.parametrize("own", [{}, {"original_text": "in French"}, {"original_text": None}, {"original_text": 3}])
@pytest.mark.parametrize("reload", [False, True])
def test_a_document_that_passes_twice_is_read_as_once(reader, compressor, documents, method, own, reload):
    if method != "mean-pool":
        compressor = make_compressor(method, reader)
    for document in documents:
        document.metadata |= own
    shorten = CompressedContextDocumentCompressor(compressor, ratio=2)
    once = shorten.compress_documents(documents, QUESTION)
    if reload:
        once = [Document(**json.loads(d.model_dump_json())) for d in once]
    twice = CompressedContextDocumentCompressor(compressor, ratio=2).compress_documents(once, QUESTION)
    llm = CompressedContextLLM(reader=reader, max_new_tokens=6)
    for first, second, text in zip(once, twice, TEXTS):
        assert llm.invoke(f"{second.page_content}\n{QUESTION}") == llm.invoke(f"{first.page_content}\n{QUESTION}")
        assert second.metadata == first.metadata
        assert first.metadata["nutgraf_original_text" if own else "original_text"] == text
        assert first.metadata.items() >= own.items()


def test_a_document_whose_original_is_lost_is_refused(reader, compressor, documents):
    shorten = CompressedContextDocumentCompressor(compressor, ratio=4)
    (made, _) = shorten.compress_documents(documents, QUESTION)
    for content in (made.page_content, f"Title\n{made.page_content}"):
        with pytest.raises(PlaceholderError, match="was compressed before"):
            shorten.compress_documents([Document(page_content=content)], QUESTION)


class NothingToSay(LogitsProcessor):
    """Has the reader end its answer at once."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([2]), 0.0)


async def test_an_empty_answer_is_streamed(reader):
    options = {"logits_processor": LogitsProcessorList([NothingToSay()])}
    for kind in (CompressedContextLLM, CompressedContextChatModel):
        model = kind(reader=reader, options=options)
        assert "".join([StrOutputParser().invoke(piece) for piece in model.stream(QUESTION)]) == ""
        assert "".join([StrOutputParser().invoke(piece) async for piece in model.astream(QUESTION)]) == ""


def test_streamed_answers_and_other_messages_are_history(reader):
    model = CompressedContextChatModel(reader=reader, max_new_tokens=4)
    answer = None
    for chunk in model.stream([HumanMessage("Hi")]):
        answer = chunk if answer is None else answer + chunk
    assert isinstance(answer, AIMessageChunk)
    plain = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage(answer.content), HumanMessage("And?")]
    wanted = model.invoke(plain).content
    chunks = [SystemMessageChunk("Be brief."), HumanMessageChunk("Hi"), answer, HumanMessageChunk("And?")]
    assert model.invoke(chunks).content == wanted
    roles = [ChatMessage("Be brief.", role="system"), ChatMessage("Hi", role="human")]
    roles += [ChatMessageChunk(answer.content, role="assistant"), ChatMessage("And?", role="user")]
    assert model.invoke(roles).content == wanted
    parts = [*plain[:3], HumanMessage([{"type": "text", "text": "An"}, {"type": "text", "text": "d?", "index": 0}])]
    assert model.invoke(parts).content == wanted
    calls = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    for message, said in [
        (ChatMessage("x", role="critic"), "'critic'"),
        (FunctionMessage("x", name="f"), "'function'"),
        (ToolMessageChunk("x", tool_call_id="1"), "ToolMessageChunk"),
        (calls, "tool calls"),
        (HumanMessage([{"type": "image_url"}]), "'image_url'"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.invoke([*plain[:2], message])


def test_prompts_are_counted_as_the_reader_reads_them(reader, compressor, documents):
    (shorter, _) = CompressedContextDocumentCompressor(compressor, ratio=4).compress_documents(documents, QUESTION)
    passage = compressor.compress(TEXTS[:1], ratio=4)[0]
    for llm in (CompressedContextLLM(reader=reader), CompressedContextChatModel(reader=reader)):
        assert llm.get_num_tokens(QUESTION) == reader.length(QUESTION)
        assert llm.get_num_tokens("") == 0
        assert llm.get_num_tokens(f"{shorter.page_content}\n{QUESTION}") == reader.length([passage, f"\n{QUESTION}"])


def test_text_methods_give_text_for_any_llm(reader, documents):
    shorten = CompressedContextDocumentCompressor(make_compressor("selective-context", reader), ratio=2)
    found = shorten.compress_documents(documents, QUESTION)
    for document, text in zip(found, TEXTS):
        assert 0 < len(document.page_content) < len(text)
        assert MARKER not in document.page_content


def test_a_budget_in_tokens(reader, compressor, documents):
    text = make_compressor("selective-context", reader)
    shorten = CompressedContextDocumentCompressor(text, max_tokens=9)
    for document in shorten.compress_documents(documents, QUESTION):
        assert 6 <= len(reader.tokenize(document.page_content)) <= 9
    with pytest.raises(ValueError, match="not both"):
        CompressedContextDocumentCompressor(text, ratio=2, max_tokens=9)
    with pytest.raises(ValueError, match="max_tokens needs a compressor to text"):
        CompressedContextDocumentCompressor(compressor, max_tokens=9)
    with pytest.raises(ValueError, match="max_tokens must be"):
        CompressedContextDocumentCompressor(text, max_tokens=0)


def test_forged_placeholders(reader, compressor, documents):
    shorten = CompressedContextDocumentCompressor(compressor, ratio=4)
    genuine = shorten.compress_documents(documents, QUESTION)[0].page_content
    with pytest.raises(ValueError, match="The question contains a placeholder"):
        shorten.compress_documents(documents, f"{genuine} {QUESTION}")
    forged = f"{MARKER}{'0' * 8}-{'0' * 12}-0:5:{'A' * 22}]]"
    llm = CompressedContextLLM(reader=reader, max_new_tokens=4)
    assert llm.invoke(forged) == reader.generate([forged], 4)[0]
    with pytest.raises(PlaceholderError, match="torn"):
        llm.invoke(genuine[:-6])


def test_bad_arguments(reader, compressor):
    with pytest.raises(TypeError, match="nutgraf Reader"):
        CompressedContextLLM(reader="gpt-4")
    with pytest.raises(TypeError, match="nutgraf compressor"):
        CompressedContextDocumentCompressor("icae")
    with pytest.raises(ValueError, match="at least 1"):
        CompressedContextDocumentCompressor(compressor, ratio=0.5)
    llm = CompressedContextChatModel(reader=reader)
    with pytest.raises(ValueError, match="'tool'"):
        llm.invoke([ToolMessage("x", tool_call_id="1")])
