"""Errors that a client is told about, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: the HTTP status.
        param: the field of the request that is at fault, if one is.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}
