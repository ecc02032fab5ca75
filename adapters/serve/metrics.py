"""Prometheus metrics of a server."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .batching import Batcher

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PAGES = ("/v1/completions", "/v1/chat/completions", "/v1/passages")


class Metrics:
    """Counts requests, tokens and passages of one application, as ASGI middleware around it.

    Args:
        batcher: its queue is shown.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batcher: Batcher) -> None:
        self._registry = made = CollectorRegistry()
        names = ["page", "status"]
        self.requests = Counter("nutgraf_requests", "Answered requests", names, registry=made)
        self.seconds = Histogram(
            "nutgraf_request_seconds", "Time to the end of an answer", ["page"], registry=made, buckets=_SECONDS
        )
        self.first = Histogram(
            "nutgraf_stream_first_piece_seconds",
            "Time from a streamed request to the first piece of its answer",
            registry=made,
            buckets=_SECONDS,
        )
        self.prompts = Counter("nutgraf_prompt_positions", "Positions of prompts that were read", registry=made)
        self.tokens = Counter("nutgraf_answer_tokens", "Tokens of answers", registry=made)
        self.passages = Counter("nutgraf_passages", "Passages in prompts, by origin", ["how"], registry=made)
        Gauge("nutgraf_waiting_prompts", "Queued prompts", registry=made).set_function(lambda: batcher.waiting)
        self.streams = Gauge("nutgraf_streams", "Answers being streamed", registry=made)
        self.batch = Histogram(
            "nutgraf_batch_prompts", "Prompts read together", registry=made, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        batcher.on_batch = self.batch.observe

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_passages(self, how: str, number: int) -> None:
        """Count passages in prompts."""
        if number:
            self.passages.labels(how).inc(number)

    def wrap(self, app: Any) -> Any:
        """Return the ASGI application with its requests counted."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            page = next((name for name in _PAGES if scope["path"].startswith(name)), "other")
            start, status = time.perf_counter(), 500

            async def watched(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                self.requests.labels(page, str(status)).inc()
                self.seconds.labels(page).observe(time.perf_counter() - start)

        return counted
