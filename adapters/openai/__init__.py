"""Readers behind an HTTP server: vLLM, SGLang, or ``nutgraf serve``."""

from __future__ import annotations

from .checks import find_known_bugs
from .client import ServedReader
from .embeddings import EmbeddingTable
from .errors import (
    KnownBugError,
    KnownBugWarning,
    RequestRefusedError,
    ServerFaultError,
    ServerTimeoutError,
    ServerUnavailableError,
    ServingError,
    StreamCutError,
    UnexpectedAnswerError,
)
from .payload import encode_tensor

__all__ = [
    "EmbeddingTable",
    "KnownBugError",
    "KnownBugWarning",
    "RequestRefusedError",
    "ServedReader",
    "ServerFaultError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "ServingError",
    "StreamCutError",
    "UnexpectedAnswerError",
    "encode_tensor",
    "find_known_bugs",
]
