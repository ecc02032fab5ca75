"""``nutgraf serve``: a reader behind an OpenAI-compatible server that takes prompt embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .limits import Limits

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["Limits", "create_app"]


def __getattr__(name: str) -> Any:
    # FastAPI is an extra
    if name == "create_app":
        from .app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
