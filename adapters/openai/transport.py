"""HTTP requests to a serving engine: retries, deadlines, server-sent events, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from .errors import (
    RequestRefusedError,
    ServerFaultError,
    ServerTimeoutError,
    ServerUnavailableError,
    ServingError,
    StreamCutError,
    UnexpectedAnswerError,
)

_MAX_ANSWER = 2**26  # bytes of an unstreamed answer
_MAX_WAIT = 30.0  # seconds between two attempts
_QUOTED = 500  # characters quoted from a server's message


class Transport:
    """A connection pool to one server, with the arguments of `ServedReader`. Thread-safe.

    ``root`` is the server's address without ``/v1``; each backoff is shortened a little at random.
    """

    def __init__(self, root: str, headers: Mapping[str, str], timeout: float, retries: int, backoff: float) -> None:
        self.root = root
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self._client = httpx.Client(base_url=root, headers=dict(headers), timeout=timeout)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str) -> httpx.Response | None:
        """Fetch a page without retries; ``None`` if there is none."""
        try:
            response = self._client.get(path, timeout=min(self.timeout, 10.0))
        except httpx.HTTPError:
            return None
        return response if response.is_success else None

    def ask(self, path: str, body: Mapping[str, Any]) -> httpx.Response | None:
        """Post a small request without retries; ``None`` if the server does not answer it."""
        try:
            response = self._client.post(path, json=body, timeout=min(self.timeout, 3.0))
        except httpx.HTTPError:
            return None
        return response if response.is_success else None

    def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """Return the server's answer to a JSON request.

        Raises:
            ServingError: when the last attempt fails, or at once if a retry would not help.
        """
        tries = self._tries(retries)
        while True:
            try:
                return self._post(path, body)
            except ServingError as error:
                time.sleep(tries.after(error))

    def stream(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Iterator[Any]:
        """Yield the events of a streamed answer; retried only before the first event.

        Raises:
            StreamCutError: if the stream ends early.
            ServingError: for other failures.
        """
        tries = self._tries(retries)
        while True:
            begun = False
            try:
                for event in self._events(path, body):
                    begun = True
                    yield event
                return
            except ServingError as error:
                if begun:
                    raise
                time.sleep(tries.after(error))

    def connect(self) -> httpx.AsyncClient:
        """Make an asynchronous client for `apost`, which belongs to one event loop."""
        return httpx.AsyncClient(base_url=self.root, headers=self._client.headers, timeout=self.timeout)

    async def apost(
        self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any], *, retries: int | None = None
    ) -> Any:
        """`post` whose connection is closed when the task is cancelled."""
        tries = self._tries(retries)
        while True:
            try:
                return await self._apost(client, path, body)
            except ServingError as error:
                await asyncio.sleep(tries.after(error))

    def _tries(self, retries: int | None) -> _Tries:
        return _Tries(self.retries if retries is None else retries, self.backoff)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        deadline = time.monotonic() + self.timeout
        data = bytearray()
        with _translated(self.root, self.timeout), self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                response.read()
            self._check(response)
            for chunk in response.iter_bytes():
                data += chunk
                self._check_bounds(data, deadline)
        return self._parse(data)

    async def _apost(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        deadline = time.monotonic() + self.timeout
        data = bytearray()
        with _translated(self.root, self.timeout):
            async with client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    await response.aread()
                self._check(response)
                async for chunk in response.aiter_bytes():
                    data += chunk
                    self._check_bounds(data, deadline)
        return self._parse(data)

    def _check_bounds(self, data: bytearray, deadline: float) -> None:
        if time.monotonic() > deadline:  # httpx limits only the time between chunks
            raise ServerTimeoutError(f"{self.root} had not answered in full after {self.timeout:g} s.")
        if len(data) > _MAX_ANSWER:
            raise UnexpectedAnswerError(f"{self.root} answered with more than {_MAX_ANSWER:,} bytes.")

    def _parse(self, data: bytearray) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise UnexpectedAnswerError(
                f"{self.root} answered with something other than JSON: {bytes(data[:80])!r}; is engine= right?"
            ) from error

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        with (
            _translated(self.root, self.timeout),
            self._client.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            if not response.is_success:
                response.read()
            self._check(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise UnexpectedAnswerError(
                        f"{self.root} streams something other than JSON: {data!r:.200}."
                    ) from error
                if not isinstance(event, dict):
                    raise UnexpectedAnswerError(
                        f"{self.root} streams something other than a JSON object: {data!r:.200}."
                    )
                if "error" in event:
                    raise self._given_up(event, response.status_code)
                yield event
        raise StreamCutError(f"{self.root} ended the stream before the answer was complete.")

    def _given_up(self, event: dict[str, Any], status: int) -> ServingError:
        """The error of an event inside a stream, whose HTTP status is 200."""
        inner = event["error"]
        code = inner.get("code") if isinstance(inner, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else status
        if 400 <= status < 500 and status != 429:
            return RequestRefusedError(f"{self.root} refused the request ({status}): {_message(event)}", status)
        return ServerFaultError(f"{self.root} gave up: {_message(event)}", status)

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        status = response.status_code
        try:
            said = _message(json.loads(response.content))
        except ValueError:
            said = response.content.decode("utf-8", "replace")
        said = said[:_QUOTED] or response.reason_phrase
        if status == 429 or status >= 500:
            raise ServerFaultError(f"{self.root} answered {status}: {said}", status, _seconds(response))
        raise RequestRefusedError(f"{self.root} refused the request ({status}): {said}{_hint(said)}", status)


class _Tries:
    """Counts the tries of one request."""

    def __init__(self, retries: int, backoff: float) -> None:
        self.left = retries
        self.delay = backoff
        self.first: ServingError | None = None

    def after(self, error: ServingError) -> float:
        """Return the seconds to wait after a failed try, or raise its error if it was the last one."""
        if not error.transient or not self.left:
            if self.first is not None and str(self.first) != str(error):
                error.args = (f"{error} (At first: {self.first})", *error.args[1:])  # often the cause of what follows
            raise error
        self.first = self.first or error
        self.left -= 1
        delay = min(self.delay, _MAX_WAIT) * random.uniform(0.75, 1.0)
        self.delay *= 2
        asked = getattr(error, "retry_after", None)
        return delay if asked is None else min(max(asked, delay), _MAX_WAIT)


@contextlib.contextmanager
def _translated(root: str, timeout: float) -> Iterator[None]:
    """Convert httpx's errors."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerTimeoutError(f"{root} did not answer within {timeout:g} s ({type(error).__name__}).") from error
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        raise StreamCutError(f"{root} cut the connection before the answer was complete: {error}") from error
    except httpx.HTTPError as error:
        raise ServerUnavailableError(f"{root} cannot be reached: {error or type(error).__name__}") from error


def _seconds(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None  # absent, or a date


def _message(answer: Any) -> str:
    """The message of an error in OpenAI's, older vLLM's or FastAPI's format."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        if isinstance(inner, dict):
            inner = inner.get("message", inner.get("detail", inner))
        return inner if isinstance(inner, str) else json.dumps(inner)
    return json.dumps(answer)


def _hint(said: str) -> str:
    if said == "Not Found":
        return ". Is it the engine that engine= names?"
    if "radix" in said:
        return " Start SGLang with --disable-radix-cache."
    if "prompt_embeds" in said and "enable" in said:
        return " Start vLLM with --enable-prompt-embeds."
    return ""
