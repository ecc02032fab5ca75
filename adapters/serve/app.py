"""OpenAI-compatible server for a reader, with compressed passages in prompts."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from .metrics import Metrics
except ImportError as error:  # an extra of the package
    raise ImportError("Serving needs FastAPI, uvicorn and prometheus-client: pip install 'nutgraf[serve]'.") from error

from ...compressors import Compressor, Reader
from ...compressors.reader.checks import check_reads_slots
from ...compressors.reader.plan import PromptPlan
from ..checks import check_compressor
from ..store import PassageStore
from .batching import Answered, AnswerOptions, Batcher
from .errors import RequestError
from .keys import Keys
from .limits import Limits
from .passages import NewPassages, Passages, check_fits
from .replies import Reply
from .requests import ChatRequest, CompletionRequest, Prompts, check_model, parse

_log = logging.getLogger(__name__)
T = TypeVar("T")
READER_HEADER = "X-Nutgraf-Reader"
_FAILED = "The reader failed; the server's log says why."


class _Json(JSONResponse):
    """JSON in ASCII: what clients send may hold lone surrogates, which UTF-8 cannot hold."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def create_app(
    reader: Reader,
    *,
    compressor: Compressor | None = None,
    store: PassageStore | None = None,
    ratio: float | None = None,
    name: str | None = None,
    limits: Limits | None = None,
    api_key: str | Sequence[str] | None = None,
) -> FastAPI:
    """Make an application with OpenAI's completions, chats and models, ``/v1/passages``, ``/health`` and ``/metrics``.

    Concurrent prompts are read in one batch, whatever passages they hold, streamed or not. Special tokens in texts are plain
    text. The application closes neither the reader nor the store.

    Args:
        reader: answers the prompts.
        compressor: compresses passages that come as text; default: they are refused.
        store: holds passages that prompts name by id, and those compressed here; default: none.
        ratio: compression ratio L / l; default: the compressor's own.
        name: the model's name for clients; default: the reader's name.
        limits: limits of requests.
        api_key: bearer token that clients must send, or several, of which each is accepted; default: none.

    Raises:
        TypeError: if ``reader`` is not a `Reader`, or ``compressor`` not a compressor.
        ValueError: if the reader is a state-space model that would misread embeddings, the compressor is for another one, or an
            API key cannot be sent.
    """
    if not isinstance(reader, Reader):
        raise TypeError(f"reader must be a nutgraf Reader, got {type(reader).__name__}; see Reader.from_pretrained.")
    if compressor is not None:
        check_compressor(compressor)
    check_reads_slots(reader)
    check_fits(reader, compressor)
    keys = [api_key] if isinstance(api_key, str) else list(api_key or ())
    server = _Server(reader, name or reader.name, limits or Limits(), Keys(keys))
    server.passages = Passages(compressor, store, ratio, server.metrics.count_passages)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(
        title="nutgraf",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        default_response_class=_Json,
    )
    app.state.batcher = server.batcher
    app.add_middleware(server.metrics.wrap)  # type: ignore[arg-type]

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return _Json(error.body(), error.status, headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # as nginx logs it; sent to no one

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        return _Json(RequestError(str(error.detail), error.status_code).body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        _log.error("A request failed", exc_info=error)
        return _Json(RequestError(_FAILED, 500).body(), 500)

    @app.get("/health")
    async def health() -> Response:
        alive = server.batcher.alive
        status = {"status": "ok" if alive else "down", "model": server.name, "waiting": server.batcher.waiting}
        return _Json(status, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.content_type)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.check_key(request)
        return {"object": "list", "data": [server.card]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        server.check_key(request)
        server.check_name(name)
        return server.card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.answer(request, CompletionRequest, server.prompts.of_completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, ChatRequest, server.prompts.of_chat)

    @app.post("/v1/passages")
    async def add(request: Request) -> dict[str, Any]:
        with server.at_work(request):
            new = check_model(NewPassages, await server.json(request))
            return {"object": "list", "data": await server.in_thread(server.passages.add, new)}

    @app.get("/v1/passages")
    async def listed(request: Request, after: str = "", limit: int = 100) -> Any:
        server.check_key(request)
        return await server.in_thread(server.passages.page, after, limit)

    @app.get("/v1/passages/{name}")
    async def one(request: Request, name: str) -> Any:
        server.check_key(request)
        return await server.in_thread(server.passages.one, name)

    @app.delete("/v1/passages/{name}")
    async def delete(request: Request, name: str) -> Any:
        server.check_key(request)
        return await server.in_thread(server.passages.delete, name)

    @app.exception_handler(RequestValidationError)
    async def no_number(request: Request, error: RequestValidationError) -> Response:
        return _Json(RequestError("limit must be a number.", 400, "limit").body(), 400)

    return app


class _Server:
    """State shared by the routes of an application."""

    def __init__(self, reader: Reader, name: str, limits: Limits, keys: Keys) -> None:
        self.reader = reader
        self.name = name
        self.limits = limits
        self.batcher = Batcher(reader, limits)
        self.metrics = Metrics(self.batcher)
        self.passages = Passages(None, None)
        self.prompts = Prompts(reader, limits, lambda refs, param: self.passages.resolve(refs, param))
        # Of its own: prompts that wait for the compressor must not hold up those that do not.
        self._pool = ThreadPoolExecutor(32, "nutgraf-serve")
        self._at_work = 0
        self.streams = asyncio.Semaphore(limits.max_streams)
        self._keys = keys
        self.card = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "nutgraf",
            "max_model_len": self.prompts.max_positions,
            "reader": reader.fingerprint,
            "width": reader.width,
        }

    def check_key(self, request: Request) -> None:
        if not self._keys.accept(request.headers.get("authorization", "")):
            raise RequestError("The API key is missing or wrong.", 401)

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise RequestError(f"There is no model {name!r:.100} here; it is {self.name!r}.", 404, "model")

    def close(self) -> None:
        """Finish the running batch and refuse what waits."""
        self.batcher.close()
        self._pool.shutdown(cancel_futures=True)

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work; give up waiting, not working, after the time limit."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        try:
            return await asyncio.wait_for(running, self.limits.timeout_s)
        except TimeoutError as error:
            raise RequestError(f"There was no answer after {self.limits.timeout_s:g} s.", 504) from error

    async def answer(self, http: Request, kind: type[Any], make: Callable[[Any], list[PromptPlan]]) -> Response:
        """Answer one request, whole or streamed."""
        with self.at_work(http):
            request = parse(kind, await self.json(http))
            self._check_who(request, http)
            return await _while_connected(http, self._respond(request, kind, make))

    @contextmanager
    def at_work(self, http: Request) -> Iterator[None]:
        """Count a request with a body, which takes memory; refuse one too many, or one without the key."""
        self.check_key(http)
        limits = self.limits
        if self._at_work >= limits.max_queue + limits.max_batch + limits.max_streams:
            raise RequestError(f"{self._at_work} requests are waiting already; try again later.", 429)
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    async def _respond(self, request: Any, kind: type[Any], make: Callable[[Any], list[PromptPlan]]) -> Response:
        start = time.perf_counter()
        plans = await self.in_thread(make, request)
        options = self.prompts.options(request, plans)
        self.metrics.prompts.inc(sum(map(len, plans)))
        reply = Reply(self.name, chat=kind is ChatRequest)
        if request.stream:
            if len(plans) != 1:
                raise RequestError("One prompt at a time can be streamed.", 400, "stream")
            events = self._events(plans[0], options, reply, request.wants_usage(), start)
            first = await anext(events)  # an early refusal keeps its status
            return _Stream(_prepend(first, events), self.limits.timeout_s)
        answers = await self._read(plans, options)
        self.metrics.tokens.inc(sum(answer.tokens for answer in answers))
        return _Json(reply.whole(answers, sum(map(len, plans))))

    async def _read(self, plans: list[PromptPlan], options: AnswerOptions) -> list[Answered]:
        futures = self.batcher.submit(plans, options)
        try:
            waits = asyncio.gather(*map(asyncio.wrap_future, futures))
            return list(await asyncio.wait_for(waits, self.limits.timeout_s))
        except TimeoutError as error:
            raise RequestError(f"There was no answer after {self.limits.timeout_s:g} s.", 504) from error
        except RequestError:
            raise
        except Exception as error:  # beyond this point the connection would be closed without an answer
            _log.error("A batch failed", exc_info=error)
            raise RequestError(_FAILED, 500) from error
        finally:
            for future in futures:  # after a timeout, a closed connection or the failure of one prompt
                future.cancel()

    async def _events(
        self, plan: PromptPlan, options: AnswerOptions, reply: Reply, usage: bool, start: float
    ) -> AsyncIterator[bytes]:
        try:
            await asyncio.wait_for(self.streams.acquire(), self.limits.timeout_s)
        except TimeoutError as error:
            raise RequestError("Too many answers are being streamed; try again later.", 429) from error
        self.metrics.streams.inc()
        items: asyncio.Queue[Any] = asyncio.Queue()
        answer: Future[Answered] | None = None
        given = 0
        try:
            answer = self.batcher.stream(plan, options, _putting(items))
            answer.add_done_callback(_putting(items))
            for event in reply.opening():
                yield _sse(event)
            while isinstance(item := await items.get(), str):
                given += 1
                if given == 1:
                    self.metrics.first.observe(time.perf_counter() - start)
                yield _sse(reply.piece(item))
            try:
                done = answer.result()
            except RequestError as error:
                if not given and not reply.opening():
                    raise
                yield _sse(error.body())
                return
            except Exception as error:
                _log.error("A stream failed", exc_info=error)
                yield _sse(RequestError(_FAILED, 500).body())
                return  # without [DONE]: the answer is not complete
            given = done.tokens
            yield _sse(reply.piece("", done.finish))
            if usage:
                yield _sse(reply.usage(len(plan), done.tokens))
            yield b"data: [DONE]\n\n"
        finally:
            if answer is not None:
                answer.cancel()  # if the client left
            self.metrics.streams.dec()
            self.metrics.tokens.inc(given)
            self.streams.release()

    async def json(self, http: Request) -> Any:
        """Read a request's body."""
        most, body = self.limits.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > most:
                        raise RequestError(f"A request may hold {most:,} bytes.", 413)
        except TimeoutError as error:
            raise RequestError(f"The request did not arrive within {self.limits.timeout_s:g} s.", 408) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The request is not JSON: {error}.") from error

    def _check_who(self, request: Any, http: Request) -> None:
        self.check_name(request.model)
        reader = http.headers.get(READER_HEADER)
        if reader is not None and reader != self.reader.fingerprint:
            raise RequestError(
                f"The prompt was embedded for the reader {reader:.80}, but this is {self.reader.fingerprint}; compress the "
                "passages for this reader.",
                409,
            )


class _Stream(StreamingResponse):
    """An event stream that ends when the client has not read for ``timeout_s`` seconds."""

    def __init__(self, events: AsyncIterator[bytes], timeout_s: float) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.timeout_s = timeout_s

    async def stream_response(self, send: Callable[[Any], Awaitable[None]]) -> None:
        async def soon(message: Any) -> None:
            await asyncio.wait_for(send(message), self.timeout_s)

        try:
            await super().stream_response(soon)
        except TimeoutError:
            _log.warning("A client did not read its stream for %g s; the stream is closed.", self.timeout_s)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


async def _while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work; cancel it and raise ``ClientDisconnect`` when the client closes the connection."""

    async def closed() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(closed())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _putting(items: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """Return a function that puts an item into a queue of this event loop from another thread."""
    loop = asyncio.get_running_loop()

    def put(item: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(items.put_nowait, item)

    return put


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def _prepend(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()  # type: ignore[attr-defined]
