"""Read a blocking iterator from an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")
_END = object()


async def from_thread(make: Callable[[], Iterator[ItemT]]) -> AsyncIterator[ItemT]:
    """Yield the items of an iterator that runs in its own thread; the thread ends soon after this generator."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    stopped = threading.Event()

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
