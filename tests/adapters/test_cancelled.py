"""Cancelled tasks end their generation, in every framework."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fakes import Fixed
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import TextNode
from nutgraf import Reader, make_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressPassages
from nutgraf.adapters.openai import ServedReader
from nutgraf.adapters.serve.batching import AnswerOptions
from nutgraf.adapters.serve.batching import generate as answer_batch
from nutgraf.adapters.store import MemoryStore
from nutgraf.compressors.reader.generation import Cancelled

LONG = 1500


@pytest.fixture
def slow(zoo) -> tuple[Reader, list[float]]:
    """A reader that takes 10 ms a step, and the times of its steps."""
    reader = zoo.reader("llama", num_hidden_layers=1)
    reader.__dict__["eos_ids"] = []
    steps: list[float] = []

    def wait(*_: Any) -> None:
        steps.append(time.monotonic())
        time.sleep(0.01)

    reader.model.model.layers[0].register_forward_pre_hook(wait)
    return reader, steps


async def _all(pieces: AsyncIterator[Any]) -> list[Any]:
    return [piece async for piece in pieces]


async def _llama_index_stream(reader: Reader) -> Any:
    return await _all(await CompressedContextLLM(reader, max_new_tokens=LONG).astream_complete("Hello"))


async def _llama_index_chat_stream(reader: Reader) -> Any:
    llm = CompressedContextLLM(reader, max_new_tokens=LONG, chat=True)
    return await _all(await llm.astream_chat([ChatMessage(content="Hello")]))


def _langchain(kind: str) -> Any:
    adapter = pytest.importorskip("nutgraf.adapters.langchain")
    return getattr(adapter, kind)


def _haystack(reader: Reader) -> Awaitable[Any]:
    adapter = pytest.importorskip("nutgraf.adapters.haystack")
    return adapter.CompressedContextGenerator(reader, max_new_tokens=LONG).run_async("Hello")


def _counting(reader: Reader, ran: list[int], stopped: threading.Event) -> None:
    """Notes the layers that run; sets the event in the second."""

    def note(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ran.append(number)
            if number == 1:
                stopped.set()

        return hook

    for number, layer in enumerate(reader.model.model.layers):
        layer.register_forward_pre_hook(note(number))


@pytest.mark.parametrize("kind", ["text", "embeds", "kv", "ragged"])
def test_a_running_prefill_ends_between_two_layers(zoo, kind):
    reader = zoo.reader("llama", num_hidden_layers=4)
    text, question = "The treaty was signed in 1648 in Westphalia.", "\nWho signed it?"
    prompt: list[Any] = [text, question]
    if kind == "embeds":
        prompt[0] = reader.identity(text)
    elif kind in ("kv", "ragged"):
        settings = {"kv": ("500x", {"num_mem": 4, "r": 2}), "ragged": ("kv-match", {"probes": 4})}
        method, own = settings[kind]
        (prompt[0],) = make_compressor(method, reader, **own).eval().compress([text], ratio=2)
    want = reader.generate([prompt], 4)
    ran: list[int] = []
    stopped = threading.Event()
    _counting(reader, ran, stopped)
    assert reader.generate([prompt, prompt], 4, stopping_criteria=[Cancelled(stopped)], batch_size=1) == ["", ""]
    assert ran == [0, 1, 0]  # the second batch does not run either
    # Streams too, and a reader whose prefill was left reads as before.
    stopped.clear()
    ran.clear()
    assert "".join(reader.stream(prompt, 4, stopping_criteria=[Cancelled(stopped)])) == ""
    assert ran == [0, 1]
    stopped.clear()
    assert reader.generate([prompt], 4) == want


def test_the_server_leaves_a_prefill_that_nobody_waits_for(zoo):
    reader = zoo.reader("llama", num_hidden_layers=4)
    ran: list[int] = []
    stopped = threading.Event()
    _counting(reader, ran, stopped)
    plans = reader.plan(["Hello", "The treaty was signed in 1648."])
    (one, other) = answer_batch(reader, plans, AnswerOptions(4), lambda place: stopped.is_set())
    assert ran == [0, 1]
    assert (one.text, other.text) == ("", "")
    ran.clear()
    answer_batch(reader, plans, AnswerOptions(4), lambda place: place == 0)  # somebody waits for the other one
    assert ran[:4] == [0, 1, 2, 3]


RUNS: dict[str, Callable[[Reader], Awaitable[Any]]] = {
    "llama-index complete": lambda r: CompressedContextLLM(r, max_new_tokens=LONG).acomplete("Hello"),
    "llama-index beams": lambda r: CompressedContextLLM(
        r, max_new_tokens=LONG, generation_kwargs={"num_beams": 2}
    ).acomplete("Hello"),
    "llama-index chat": lambda r: CompressedContextLLM(r, max_new_tokens=LONG).achat([ChatMessage(content="Hello")]),
    "llama-index stream": _llama_index_stream,
    "llama-index chat stream": _llama_index_chat_stream,
    "langchain": lambda r: _langchain("CompressedContextLLM")(reader=r, max_new_tokens=LONG).ainvoke("Hello"),
    "langchain stream": lambda r: _all(
        _langchain("CompressedContextLLM")(reader=r, max_new_tokens=LONG).astream("Hello")
    ),
    "langchain chat": lambda r: _langchain("CompressedContextChatModel")(reader=r, max_new_tokens=LONG).ainvoke("Hi"),
    "langchain chat stream": lambda r: _all(
        _langchain("CompressedContextChatModel")(reader=r, max_new_tokens=LONG).astream("Hi")
    ),
    "haystack": _haystack,
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
async def test_a_cancelled_task_ends_its_generation(slow, run):
    reader, steps = slow
    reader.decode = lambda ids: ""  # nothing that can be shown, so no piece wakes the thread
    task = asyncio.ensure_future(RUNS[run](reader))
    while len(steps) < 3:
        await asyncio.sleep(0.01)
        assert not task.done() or task.result() is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.3)
    taken = len(steps)
    await asyncio.sleep(0.2)
    assert len(steps) == taken
    assert taken < 200


@pytest.mark.slow
async def test_a_cancelled_ingestion_ends_after_its_batch(reader):
    compressor, store = Fixed(reader), MemoryStore()
    begun, go = threading.Event(), threading.Event()
    encode = compressor.encode

    def wait(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        go.wait(10)
        return encode(*args, **kwargs)

    compressor.encode = wait  # type: ignore[method-assign]
    nodes = [TextNode(text=f"text {i}") for i in range(6)]
    task = asyncio.ensure_future(CompressPassages(compressor, store, batch_size=2).acall(nodes))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await asyncio.sleep(0.3)
    assert store.stats.passages == 2


@pytest.mark.slow
async def test_a_cancelled_request_closes_its_connection(reader):
    closed: list[bool] = []
    asked = threading.Barrier(4)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.wait(10)
            self.connection.settimeout(10)
            closed.append(self.connection.recv(1) == b"")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote = ServedReader(f"http://127.0.0.1:{server.server_port}", "tiny", reader)
        task = asyncio.ensure_future(remote.agenerate(["a", "b", "c"], 8))
        await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            await asyncio.sleep(0.02)
            if len(closed) == 3:
                break
        assert closed == [True] * 3
    finally:
        server.shutdown()
