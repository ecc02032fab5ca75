"""Placeholders: short strings that stand for compressed passages in a framework's prompt.

RAG frameworks carry text from the retriever to the LLM: they join it, count it, log it and put it into templates. For a
compressed passage they carry a placeholder, and the LLM replaces it by the passage::

    [[nutgraf:<store>-<request>-<number>:<slots>:<tag>]]

The tag is a MAC under the store's secret: nobody can forge a placeholder, and a lookalike stays plain text. The tag grows
with the number of slots, so that a framework that counts a placeholder's own text tokens charges at least about as many as
the passage takes.

A copied placeholder (from a log, say) gives access to a passage. Three rules limit this:

* Each request gets new placeholders. The store forgets them after ``max_age`` seconds or ``max_requests`` requests. Text
  written before the request (a document, the question) cannot contain one.
* `CompressedContextPostprocessor` refuses a question that contains one and escapes them in all text for the LLM. Compressed
  text is never searched for placeholders.
* A placeholder opens a passage only for the reader it was compressed for.

Not covered: someone who sees the prompts of a running process within ``max_age`` and whose text reaches the LLM without the
postprocessor (a chat engine that rewrites the question first, a direct ``llm.complete``). Run `escape_placeholders` over
such text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...compressors import CompressedPassage
from .cache import GIBIBYTE, PassageCache

MARKER = "[[nutgraf:"
_PLACEHOLDER = re.compile(r"\[\[nutgraf:([0-9a-f]{8})-([0-9a-f]{12})-([0-9]{1,5}):([0-9]{1,7}):([A-Za-z0-9_-]+)\]\]")
_HEAD = re.compile(r"\[\[nutgraf:([0-9a-f]{8})-[0-9a-f]{12}[A-Za-z0-9:_-]*")
_MIN_TAG = 22  # characters, 132 bits
_TAG_PER_SLOT = 1.6  # random base64 takes 0.7 tokens a character or more in common vocabularies
_TORN_TAG = 8  # characters of a genuine tag that give a torn placeholder away


class PlaceholderError(RuntimeError):
    """A genuine placeholder cannot be read: it was torn, has expired, or belongs to another reader.

    Not a ``ValueError``, because LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


@dataclass(frozen=True)
class Found:
    """A genuine placeholder in a text: its spelling, its store, its request, its number there and its slots."""

    spelled: str
    store: PlaceholderStore
    request: str
    number: int
    slots: int


class PlaceholderStore:
    """Issues placeholders and holds their passages until they are read. Thread-safe.

    Reading is a lookup and never compresses. The store forgets whole requests, oldest first, beyond any of the bounds; the
    newest request always stays.

    Args:
        cache: shared by the adapters that issue from this store, which fill it; a new `PassageCache` by default.
        max_requests: requests held.
        max_age: seconds for which a placeholder can be read.
        max_bytes: bytes of the passages held; a passage of several requests counts once.

    Raises:
        ValueError: if a bound is not positive.
    """

    def __init__(
        self,
        cache: PassageCache | None = None,
        *,
        max_requests: int = 1024,
        max_age: float = 3600.0,
        max_bytes: int = GIBIBYTE,
    ) -> None:
        if max_requests < 1 or max_age <= 0 or max_bytes < 1:
            raise ValueError(f"The bounds must be positive, got {max_requests=}, {max_age=} and {max_bytes=}.")
        self.cache = PassageCache() if cache is None else cache
        self.max_requests = max_requests
        self.max_age = max_age
        self.max_bytes = max_bytes
        self.name = secrets.token_hex(4)
        self._secret = secrets.token_bytes(32)
        self._requests: OrderedDict[str, tuple[float, list[CompressedPassage]]] = OrderedDict()
        self._held: Counter[int] = Counter()  # requests per passage, by id()
        self._nbytes = 0
        self._lock = threading.Lock()
        _STORES[self.name] = self

    def __reduce__(self) -> Any:
        # A copy of a node or response is about the same passages; another process does not have them.
        return _STORES.get, (self.name,)

    def issue(self, passages: Sequence[CompressedPassage]) -> list[str]:
        """Return what the LLM reads for each passage of a request, in order.

        This is a new placeholder; for a passage compressed to text, the text; for one without slots, "".
        """
        request = secrets.token_hex(6)
        held = [passage for passage in passages if _is_soft(passage)]
        if held:
            self._hold(request, held)
        numbers = iter(range(len(held)))
        return [
            self._spell(request, next(numbers), passage.places)
            if _is_soft(passage)
            else escape_placeholders(passage.text or "")
            for passage in passages
        ]

    def _hold(self, request: str, passages: list[CompressedPassage]) -> None:
        now = time.monotonic()
        with self._lock:
            self._requests[request] = (now + self.max_age, passages)
            for passage in passages:
                self._nbytes += 0 if self._held[id(passage)] else passage.nbytes
                self._held[id(passage)] += 1
            while len(self._requests) > 1 and (
                len(self._requests) > self.max_requests
                or self._nbytes > self.max_bytes
                or next(iter(self._requests.values()))[0] < now
            ):
                for passage in self._requests.popitem(last=False)[1][1]:
                    self._held[id(passage)] -= 1
                    if not self._held[id(passage)]:
                        del self._held[id(passage)]
                        self._nbytes -= passage.nbytes

    def holds(self, placeholder: re.Match[str]) -> bool:
        """Whether this store issued a placeholder, however long ago."""
        _, request, number, slots, tag = placeholder.groups()
        if len(tag) != _tag_length(int(slots)):  # before the MAC, whose cost grows with the slots claimed
            return False
        return hmac.compare_digest(placeholder.group(), self._spell(request, int(number), int(slots)))

    def open(self, found: Found, reader: str) -> CompressedPassage:
        """Return the passage of a placeholder for the reader with this fingerprint.

        Raises:
            PlaceholderError: if the placeholder has expired, or the passage was compressed for another reader.
        """
        with self._lock:
            expires, passages = self._requests.get(found.request, (0.0, []))
        if expires < time.monotonic() or found.number >= len(passages):
            raise PlaceholderError(
                f"A placeholder in the prompt has expired: they are kept for {self.max_age:g} s, {self.max_requests} "
                f"requests and {self.max_bytes:,} bytes of passages. Run the postprocessor over the nodes again, or give it "
                "a PlaceholderStore with larger bounds."
            )
        passage = passages[found.number]
        if passage.reader is not None and passage.reader != reader:
            raise PlaceholderError(
                f"A passage in the prompt was compressed for the reader {passage.reader}, but the LLM reads with {reader}; "
                "give the CompressedContextLLM and the postprocessor's compressor the same reader, the compressor's own if "
                "it tunes one: CompressedContextLLM(compressor.reader)."
            )
        return passage

    def torn(self, piece: str) -> bool:
        """Whether a run of placeholder characters is the head of one of this store's placeholders."""
        request = piece[len(MARKER) + len(self.name) + 1 :][:12]
        with self._lock:
            _, passages = self._requests.get(request, (0.0, []))
        for number, passage in enumerate(passages):
            whole = self._spell(request, number, passage.places)
            giveaway = whole[: whole.rindex(":") + 1 + _TORN_TAG]
            if piece.startswith(giveaway) or giveaway.startswith(piece):
                return True
        return False

    def _spell(self, request: str, number: int, slots: int) -> str:
        handle = f"{self.name}-{request}-{number}:{slots}"
        length = _tag_length(slots)
        mac = hashlib.shake_256(b"placeholder:" + self._secret + handle.encode())
        tag = base64.urlsafe_b64encode(mac.digest(length)).decode()[:length]
        return f"{MARKER}{handle}:{tag}]]"


def _is_soft(passage: CompressedPassage) -> bool:
    return passage.interface != "text" and passage.slots > 0


def _tag_length(slots: int) -> int:
    return max(_MIN_TAG, round(_TAG_PER_SLOT * slots))


_STORES: weakref.WeakValueDictionary[str, PlaceholderStore] = weakref.WeakValueDictionary()
_SHARED: weakref.WeakValueDictionary[str, PlaceholderStore] = weakref.WeakValueDictionary()
_KEPT: weakref.WeakKeyDictionary[Any, PlaceholderStore] = weakref.WeakKeyDictionary()
_SHARING = threading.Lock()


def shared_store(reader: Any) -> PlaceholderStore:
    """Return the store of all adapters for readers with this fingerprint; it lives as long as one of these readers."""
    fingerprint = reader.fingerprint
    with _SHARING:
        store = _SHARED.get(fingerprint)
        if store is None:
            store = _SHARED[fingerprint] = PlaceholderStore()
        _KEPT[reader] = store
        return store


def scan(text: str) -> Iterator[str | Found]:
    """Split a text at its genuine placeholders; everything else, lookalikes included, stays text."""
    start = 0
    for match in _PLACEHOLDER.finditer(text) if MARKER in text else ():
        store = _STORES.get(match[1])
        if store is None or not store.holds(match):
            continue
        if text[start : match.start()]:
            yield text[start : match.start()]
        yield Found(match.group(), store, match[2], int(match[3]), int(match[4]))
        start = match.end()
    if text[start:]:
        yield text[start:]


def read_placeholders(text: str, reader: str) -> list[str | CompressedPassage]:
    """Replace the placeholders in a prompt (or a part of one) by their passages, for the reader with this fingerprint.

    Raises:
        PlaceholderError: if a genuine placeholder was torn, has expired, or is for another reader.
    """
    pieces: list[str | CompressedPassage] = []
    for piece in scan(text):
        if isinstance(piece, Found):
            pieces.append(piece.store.open(piece, reader))
            continue
        if holds_torn(piece):
            raise PlaceholderError(
                "A placeholder was torn: the passage's slots do not fit into the share of the window that the prompt "
                "helper gave it. Use the LLM's prompt_helper(), fewer passages or a higher compression ratio."
            )
        pieces.append(piece)
    return pieces


def holds_placeholder(text: str) -> bool:
    """Whether a text contains a genuine placeholder, whole or torn."""
    return MARKER in text and any(isinstance(piece, Found) or holds_torn(piece) for piece in scan(text))


def is_placeholder(text: str) -> bool:
    """Whether a text is one placeholder and nothing else, of this or another process."""
    return _PLACEHOLDER.fullmatch(text.strip()) is not None


def refuse_placeholders(question: str | None) -> None:
    """Raise ``ValueError`` if a question contains a genuine placeholder."""
    if question is not None and holds_placeholder(question):
        raise ValueError(
            "The question contains a placeholder of a compressed passage, copied from a prompt or a log; remove it, or run "
            "escape_placeholders over the question."
        )


def holds_torn(text: str) -> bool:
    """Whether a text without whole placeholders contains the head of a torn one."""
    for match in _HEAD.finditer(text):
        store = _STORES.get(match[1])
        if store is not None and store.torn(match.group()):
            return True
    return False


def escape_placeholders(text: str) -> str:
    """Insert a space into everything that looks like a placeholder, for text from users or documents."""
    return text.replace(MARKER, "[ [nutgraf:")


class ReadingLLM:
    """Registers an LLM that reads placeholders; the entry lives as long as the LLM holds it.

    ``window``: positions for a prompt and its answer (``None``: unknown); ``num_output`` of these are kept for the answer.
    """

    def __init__(self, reader: str, window: int | None, num_output: int) -> None:
        self.reader = reader
        self.window = window
        self.num_output = num_output
        _READING.add(self)

    @staticmethod
    def of(reader: str | None) -> list[ReadingLLM]:
        """Return the living LLMs with this reader."""
        return [llm for llm in list(_READING) if llm.reader == reader]


_READING: weakref.WeakSet[ReadingLLM] = weakref.WeakSet()
