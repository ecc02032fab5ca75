"""API keys of a server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


class Keys:
    """The keys that clients may send; without any, every client is accepted.

    Raises:
        ValueError: for a key that no client can send.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if bad := [i for i, key in enumerate(keys, 1) if not key or not all("!" <= c <= "~" for c in key)]:
            raise ValueError(
                f"An API key is one or more visible ASCII characters without spaces; number {bad[0]} is not."
            )
        self._digests = [_digest(f"Bearer {key}") for key in keys]

    def accept(self, authorization: str) -> bool:
        """Whether a request's ``Authorization`` header holds a key; takes as long for each key and each header."""
        given = _digest(authorization)
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]  # all, also after the right one
        return not equal or any(equal)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
