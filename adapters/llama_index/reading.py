"""One call of the reader: from a prompt with passages to an answer, timed and counted."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ...compressors import CompressedPassage, Reader

ItemT = TypeVar("ItemT")
_END = object()


class ReaderRefusedError(RuntimeError):
    """The reader refused a prompt: it is too long, empty, or wrong in another way that the message says.

    It is no ``ValueError`` on purpose: LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


@dataclass(frozen=True)
class Answer:
    """An answer so far.

    Attributes:
        text: all of it.
        delta: its newest piece.
        raw: counts and times, see `CompressedContextLLM`.
    """

    text: str
    delta: str
    raw: dict[str, int | float]


class ReaderCall:
    """A prompt for a reader, ready to be answered at once or piece by piece.

    Args:
        reader: reads the prompt.
        make_prompt: gives the prompt: strings and compressed passages in order, or (for ``chat``) messages of these.
        chat: render the prompt through the chat template.
        settings: ``max_new_tokens``, ``stop`` and what else the reader's ``generate`` and ``stream`` take.
    """

    def __init__(
        self, reader: Reader, make_prompt: Callable[[], list[Any]], chat: bool, settings: Mapping[str, Any]
    ) -> None:
        self.reader = reader
        self.make_prompt = make_prompt
        self.options = {**settings, "chat": chat}

    def run(self) -> Answer:
        """The whole answer."""
        if (self.options.get("num_beams") or 1) > 1:
            return self._run_beams()
        answer = Answer("", "", {})
        for answer in self.stream():  # noqa: B007
            pass
        return answer

    def stream(self) -> Iterator[Answer]:
        """The answer as it grows; at least one, which is empty if the answer is. A refusal is raised at once."""
        start = time.perf_counter()
        with _refusals():
            prompt = self.make_prompt()
            pieces = self.reader.stream(prompt, **self.options)
        return self._grow(prompt, pieces, start)

    def _grow(self, prompt: list[Any], pieces: Iterator[str], start: float) -> Iterator[Answer]:
        text = ""
        raw: dict[str, int | float] = {}
        try:
            while True:
                with _refusals():
                    piece = next(pieces, None)
                now = (time.perf_counter() - start) * 1e3
                raw = {**(raw or {**self._counts(prompt), "ttft_ms": now}), "ms": now}
                if piece is None:
                    break
                text += piece
                yield Answer(text, piece, raw)
            yield Answer(text, "", raw)
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def _run_beams(self) -> Answer:
        start = time.perf_counter()
        with _refusals():
            prompt = self.make_prompt()
            text = self.reader.generate([prompt], **self.options)[0]
        now = (time.perf_counter() - start) * 1e3
        return Answer(text, text, {**self._counts(prompt), "ttft_ms": now, "ms": now})

    def _counts(self, prompt: list[Any]) -> dict[str, int | float]:
        atoms = [atom for item in prompt for atom in (item["content"] if isinstance(item, dict) else [item])]
        passages = [atom for atom in atoms if isinstance(atom, CompressedPassage)]
        return {
            "reader_tokens": self.reader.length(prompt, chat=self.options["chat"]),
            "passages": len(passages),
            "slots": sum(passage.slots for passage in passages),
            "source_tokens": sum(passage.source_tokens for passage in passages),
        }


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ReaderRefusedError(str(error)) from error


async def from_thread(make: Callable[[], Iterator[ItemT]]) -> AsyncIterator[ItemT]:
    """The items of an iterator that is made and run in a thread of its own, which ends soon after this generator does."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    stopped = threading.Event()

    def put(item: Any) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            stopped.set()

    def work() -> None:
        try:
            with closing(make()) as iterator:  # type: ignore[type-var]
                for item in iterator:
                    put(item)
                    if stopped.is_set():
                        return
            put(_END)
        except BaseException as error:
            put(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="nutgraf-astream", daemon=True).start()
    try:
        while (item := await items.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
