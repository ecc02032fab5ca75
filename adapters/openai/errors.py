"""What can go wrong between a client and a serving engine.

None of these is a ``ValueError`` on purpose: LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
"""

from __future__ import annotations


class ServingError(RuntimeError):
    """A server did not give an answer.

    Attributes:
        transient: whether trying again may help.
    """

    transient = False


class ServerUnavailableError(ServingError):
    """No connection could be made, or it broke before the answer began."""

    transient = True


class ServerTimeoutError(ServingError):
    """The server did not answer in time."""

    transient = True


class ServerFaultError(ServingError):
    """The server answered with an error of its own (429 or 5xx, or an error inside a stream).

    Attributes:
        status: the HTTP status; 200 for an error inside a stream.
        retry_after: seconds that the server asks to wait, if it does.
    """

    transient = True

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class RequestRefusedError(ServingError):
    """The server refused the request (4xx): sending it again would not help.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StreamCutError(ServingError):
    """A stream ended before its answer did.

    Attributes:
        text: the answer up to there.
    """

    transient = True

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


class UnexpectedAnswerError(ServingError):
    """The server's answer is not of the documented form."""


class KnownBugError(ServingError):
    """The server is set up in a way in which it is known to crash, to refuse prompt embeddings or to misread them."""


class KnownBugWarning(UserWarning):
    """The server is set up in a way in which it is known to crash or to misread prompt embeddings."""
