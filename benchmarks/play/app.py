"""The page of ``nutgraf play`` and its two routes."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:  # an extra of the package
    raise ImportError("The page needs FastAPI and uvicorn: pip install 'nutgraf[serve]'.") from error

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ...recipes.data.corpus import Record
from .comparison import Comparison, described

_log = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
Passage = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]


class Ask(BaseModel):
    """A question to answer from passages in one way."""

    model_config = ConfigDict(extra="forbid")
    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
    passages: list[Passage] = Field(min_length=1, max_length=20)
    way: str
    ratio: float | None = Field(default=None, ge=1, le=1000)


def create_play(comparison: Comparison, examples: Sequence[Record]) -> FastAPI:
    """Make the application: the page, ``/api/setup`` and ``/api/ask``, which streams server-sent events.

    It answers requests to this machine's own names only, so that other pages in the browser cannot read it.
    """
    app = FastAPI(title="nutgraf play", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}."}, 400)

    @app.get("/api/setup")
    async def setup() -> dict[str, Any]:
        shown = [{"question": one.question, "title": one.titles[0], "passages": one.passages} for one in examples]
        return {"reader": comparison.reader.name, "ways": described(comparison.ways), "examples": shown}

    @app.post("/api/ask")
    async def ask(request: Ask) -> Response:
        return StreamingResponse(_events(comparison, request), media_type="text/event-stream", headers=_HEADERS)

    for path, (file, kind) in _FILES.items():
        _add_file(app, path, (_HERE / file).read_bytes(), kind)
    return app


async def _events(comparison: Comparison, asked: Ask) -> AsyncIterator[bytes]:
    try:
        async for event in comparison.ask(asked.question, asked.passages, asked.way, asked.ratio):
            yield _sse(event)
    except (ValueError, ImportError) as error:  # written for users
        yield _sse({"event": "error", "text": str(error)})
    except Exception as error:
        _log.error("An answer failed", exc_info=error)
        yield _sse({"event": "error", "text": "The reader failed; the terminal says why."})


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path)
    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
