"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request is answered with an error: HTTP ``status`` and, if one is at fault, the request's field ``param``."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}
