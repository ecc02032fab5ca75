"""Errors of a client of a serving engine.

None is a ``ValueError``, because LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
"""

from __future__ import annotations


class ServingError(RuntimeError):
    """A server gave no answer. ``text`` is the answer so far of a stream that had begun."""

    transient = False  # whether a retry may help
    text = ""


class ServerUnavailableError(ServingError):
    """No connection could be made, or it broke before the answer began."""

    transient = True


class ServerTimeoutError(ServingError):
    """The server did not answer in time."""

    transient = True


class ServerFaultError(ServingError):
    """The server failed (429, 5xx, or an error inside a stream).

    ``status`` is 200 for an error inside a stream that names no other; ``retry_after`` is the server's request in seconds.
    """

    transient = True

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class RequestRefusedError(ServingError):
    """The server refused the request (4xx, in ``status``); a retry would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StreamCutError(ServingError):
    """A stream ended before the answer was complete."""

    transient = True


class UnexpectedAnswerError(ServingError):
    """The server's answer does not have the documented form."""


class KnownBugError(ServingError):
    """The server's settings are known to crash, refuse or misread prompt embeddings."""


class KnownBugWarning(UserWarning):
    """The server's settings are known to crash or misread prompt embeddings."""
