"""Encryption at rest: AES-256-GCM over the slots, header and facts of each stored passage.

A sealed record is ``key id (8 bytes) | nonce (12) | ciphertext | tag (16)``. The nonce is random for each record, and the
associated data is the passage's id with the kind of record, so that a record that was changed, or moved to another passage,
does not open. A thief without the key still sees how many passages there are, their lengths, methods and ratios, and can test
whether a text (or, for question-aware methods, a question) that he has is among them. After 2**32 records a key should
be replaced (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .base import StoreError

VARIABLE = "NUTGRAF_STORE_KEY"
SIZE = 32  # bytes of a key
_ID, _NONCE, _TAG = 8, 12, 16
_AT = _ID + _NONCE  # where the ciphertext begins
_HOW = f"set {VARIABLE}, or pass keys=... (nutgraf store new-key makes one)"
Keys = str | bytes | Sequence[str | bytes] | Callable[[], "str | bytes | Sequence[str | bytes]"]


def new_key() -> str:
    """A random key, in base64."""
    return base64.b64encode(secrets.token_bytes(SIZE)).decode()


class WrongKeyError(StoreError):
    """A record is sealed with a key that is not given; it is not damaged."""


class Cipher:
    """Seals records with the first key, and opens those of all keys.

    Args:
        keys: 32 bytes each, or their base64 or hexadecimal digits; one string may hold several, separated by commas. Or a
            function that returns them, for a key service. None: those of the environment variable NUTGRAF_STORE_KEY.

    Raises:
        ValueError: without a key, or for one of another form.
        ImportError: if cryptography is not installed.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError("An encrypted store needs cryptography: pip install nutgraf[store].") from error
        given: Any = os.environ.get(VARIABLE, "") if keys is None else keys() if callable(keys) else keys
        parts = [given] if isinstance(given, bytes) else re.split(r"[,\s]+", given) if isinstance(given, str) else given
        raw = [_bytes_of(part.strip() if isinstance(part, str) else part) for part in parts or () if part]
        if not raw:
            raise ValueError(f"An encrypted store needs its key: {_HOW}.")
        self._boxes: dict[bytes, Any] = {_id_of(key): AESGCM(key) for key in raw}
        self._first = _id_of(raw[0])
        self._changed = InvalidTag

    def seal(self, data: bytes, about: str) -> bytes:
        """The sealed record of some bytes. `about`: what it is; `open` needs the same."""
        nonce = secrets.token_bytes(_NONCE)
        return b"".join((self._first, nonce, self._boxes[self._first].encrypt(nonce, data, about.encode())))

    def open(self, sealed: Any, about: str) -> memoryview:
        """The bytes of a sealed record, in a buffer of their own.

        Raises:
            WrongKeyError: if its key is not among those given.
            StoreError: if it was changed.
        """
        view = memoryview(sealed)
        if (size := len(view) - _AT - _TAG) < 0:
            raise StoreError("A sealed record of the store is cut off. Run `nutgraf store verify DIR`.")
        if (box := self._boxes.get(bytes(view[:_ID]))) is None:
            have = ", ".join(sorted(known.hex() for known in self._boxes))
            raise WrongKeyError(
                f"The store was encrypted with the key {view[:_ID].hex()}, and the keys given are {have}; {_HOW}."
            )
        out = memoryview(np.empty(size, dtype=np.uint8))  # type: ignore[arg-type]  # not filled with zeros first
        try:
            box.decrypt_into(view[_ID:_AT], view[_AT:], about.encode(), out)
        except self._changed as error:
            raise StoreError(
                f"The record {about} of the store was changed, or belongs to another passage: it does not open. Run "
                "`nutgraf store verify DIR --drop`, then compress the lost passages again."
            ) from error
        return out

    def seal_text(self, text: str, about: str) -> str:
        """`seal` for a column of strings."""
        return base64.b64encode(self.seal(text.encode("utf-8", "surrogatepass"), about)).decode()

    def open_text(self, sealed: str, about: str) -> str:
        """`open` for a column of strings. Raises StoreError if it is no sealed record."""
        return bytes(self.open(unpacked(sealed, about), about)).decode("utf-8", "surrogatepass")

    def is_current(self, sealed: Any) -> bool:
        """Whether a record is sealed with the first key."""
        return bytes(memoryview(sealed)[:_ID]) == self._first


def unpacked(sealed: str, about: str) -> bytes:
    """The record in a column of strings. Raises StoreError if it is none."""
    try:
        return base64.b64decode(sealed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StoreError(f"The record {about} of the store is damaged: {error}.") from error


def _bytes_of(key: str | bytes) -> bytes:
    raw = key
    if isinstance(key, str):
        try:
            raw = bytes.fromhex(key) if len(key) == 2 * SIZE else base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
    if not isinstance(raw, bytes) or len(raw) != SIZE:
        raise ValueError(
            f"A key of a store is {SIZE} bytes, {2 * SIZE} hexadecimal digits or their base64; got another form. "
            "nutgraf store new-key makes one."
        )
    return raw


def _id_of(key: bytes) -> bytes:
    """Names a key without giving it away."""
    return hashlib.sha256(b"nutgraf store key" + key).digest()[:_ID]
