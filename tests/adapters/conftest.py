"""Fixtures of the adapters' tests: a tiny reader, and LlamaIndex's events."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from nutgraf import Reader


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    """A random Llama with one layer."""
    return zoo.reader("llama", num_hidden_layers=1)


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """All events of LlamaIndex's instrumentation during the test."""
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler

    seen: list[Any] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            seen.append(event)

    handler = Handler()
    get_dispatcher().add_event_handler(handler)
    yield seen
    get_dispatcher().event_handlers.remove(handler)
