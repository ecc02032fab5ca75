"""LlamaIndex with a served reader: passages are compressed here, and ``nutgraf serve`` answers over HTTP."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from nutgraf import make_compressor
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    PassageScores,
    ReaderRefusedError,
)
from nutgraf.adapters.openai import EmbeddingTable, ServedReader, ServerUnavailableError
from texts import DELEGATES, QUESTION

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from nutgraf.adapters.serve import create_app  # noqa: E402

TEXTS = [f"{text}, and there was peace." for text in DELEGATES[:3]]


@pytest.fixture(scope="module")
def url(reader):
    server = uvicorn.Server(uvicorn.Config(create_app(reader, name="tiny"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def served(reader, url):
    with ServedReader(url, "tiny", EmbeddingTable.of(reader)) as found:
        yield found


@pytest.fixture(scope="module")
def compressor(reader):
    return make_compressor("mean-pool", reader, encoder="embeddings")


def engine(index, compressor, llm, **options):
    posts = [CompressedContextPostprocessor(compressor, ratio=4)]
    return index.as_query_engine(llm=llm, node_postprocessors=posts, similarity_top_k=3, **options)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
async def test_a_query_engine_gives_the_local_readers_answers(reader, served, compressor, index, chat):
    local, remote = (CompressedContextLLM(one, max_new_tokens=6, chat=chat) for one in (reader, served))
    wanted = str(engine(index, compressor, local).query(QUESTION))
    assert wanted
    assert str(engine(index, compressor, remote).query(QUESTION)) == wanted
    assert str(await engine(index, compressor, remote).aquery(QUESTION)) == wanted
    assert str(engine(index, compressor, remote, streaming=True).query(QUESTION)) == wanted
    assert str(index.as_query_engine(llm=remote).query(QUESTION)) != wanted  # which reads text


def test_counts_and_options(reader, served):
    raw = CompressedContextLLM(served, max_new_tokens=4).complete(QUESTION).raw
    assert raw["reader_tokens"] == reader.length(QUESTION)
    assert raw["ttft_ms"] > 0
    llm = CompressedContextLLM(served, max_new_tokens=8)
    whole = llm.complete("The treaty").text
    assert llm.complete("The treaty", stop=[whole[2:4]]).text == whole[: whole.index(whole[2:4])]
    with pytest.raises(ReaderRefusedError, match="num_beams"):
        llm.complete("The treaty", num_beams=2)
    helper = llm.response_synthesizer()._prompt_helper
    assert helper.context_window == llm.context_window == reader.max_positions


def test_a_server_that_is_gone_is_an_error_and_no_empty_response(reader, compressor, index):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gone = ServedReader(f"http://127.0.0.1:{port}/v1", "tiny", reader, retries=1, backoff=0.01)
    with pytest.raises(ServerUnavailableError):
        engine(index, compressor, CompressedContextLLM(gone, max_new_tokens=4)).query(QUESTION)


def test_what_does_not_fit_is_refused(reader, served, index):
    with pytest.raises(ValueError, match="engine='vllm'"):
        CompressedContextLLM(ServedReader("http://h/v1", "m", reader, engine="vllm-chat"))
    with pytest.raises(ValueError, match="fallback='text'"):
        CompressedContextLLM(ServedReader("http://h/v1", "m", reader, fallback="text"))
    llm = CompressedContextLLM(served, max_new_tokens=4)
    with pytest.raises(ReaderRefusedError, match="no log-likelihoods"):
        index.as_query_engine(llm=llm, response_synthesizer=PassageScores(llm)).query(QUESTION)
