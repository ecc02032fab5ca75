"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds on the size, shape and number of requests.

    Attributes:
        max_body_bytes: bytes of a request.
        max_prompts: prompts of a completion request.
        max_passages: passages that a prompt names.
        max_new_tokens: tokens of an answer.
        max_positions: positions of a prompt and its answer; ``None``: the reader's, or 32,768.
        max_batch: prompts read together.
        max_batch_positions: positions of a batch with padding (a single prompt may be longer).
        max_wait_ms: time a prompt waits for others to join its batch.
        max_queue: waiting prompts, and requests at work besides; more are refused with 429.
        max_streams: concurrent streams; others wait.
        timeout_s: seconds until an unanswered request gets 504, a waiting stream 429, a request whose body does not come
            408; and until a stream ends whose client does not read.
    """

    max_body_bytes: int = 64 * 2**20
    max_prompts: int = 64
    max_passages: int = 256
    max_new_tokens: int = 2048
    max_positions: int | None = None
    max_batch: int = 16
    max_batch_positions: int = 65_536
    max_wait_ms: float = 5.0
    max_queue: int = 256
    max_streams: int = 64
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "max_positions" and value is None:
                continue
            least = 0 if field.name == "max_wait_ms" else 1e-3 if field.name == "timeout_s" else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise ValueError(f"{field.name} must be at least {least:g}, got {value!r}.")
