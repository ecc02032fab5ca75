"""Run a reader in a thread of its own for an event loop. Work that is no longer awaited stops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, TypeVar

from ..compressors import Reader
from ..compressors.reader.generation import Cancelled

T = TypeVar("T")
ItemT = TypeVar("ItemT")
_END = object()


def ends_with(reader: Any, stopped: threading.Event | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a reader's ``generate`` or ``stream`` that also end the generation of a local `Reader` on an event."""
    if stopped is None or not isinstance(reader, Reader):
        return dict(options)
    return {**options, "stopping_criteria": [*(options.get("stopping_criteria") or ()), Cancelled(stopped)]}


async def in_thread(run: Callable[[threading.Event], T]) -> T:
    """Run a function in a worker thread. Its argument is set when the awaiting task is cancelled."""
    stopped = threading.Event()
    try:
        return await asyncio.to_thread(run, stopped)
    finally:
        stopped.set()


async def agenerate(reader: Any, prompt: Any, **options: Any) -> str:
    """Answer one prompt with a `Reader` or a ``ServedReader``; generation ends when the awaiting task is cancelled."""
    if not isinstance(reader, Reader):
        return (await reader.agenerate([prompt], **options))[0]  # type: ignore[no-any-return]
    return (await in_thread(lambda stopped: reader.generate([prompt], **ends_with(reader, stopped, options))))[0]


def astream(reader: Any, prompt: Any, **options: Any) -> AsyncIterator[str]:
    """Stream one answer of a `Reader` or a ``ServedReader``; generation ends when this iterator is closed."""
    stopped = threading.Event()
    return from_thread(lambda: reader.stream(prompt, **ends_with(reader, stopped, options)), stopped)


async def from_thread(
    make: Callable[[], Iterator[ItemT]], stopped: threading.Event | None = None
) -> AsyncIterator[ItemT]:
    """Yield the items of an iterator that runs in its own thread.

    When this generator is closed, ``stopped`` is set, and the thread ends at the latest after the next item.
    """
    stopped = stopped or threading.Event()
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()

    def put(item: Any) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, item)
        except RuntimeError:  # the loop is closed
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
