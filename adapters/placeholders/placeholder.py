"""Placeholders: ordinary strings that stand in a framework's prompt where a compressed passage is to be read.

RAG frameworks carry text from the retriever to the LLM: they join it, count it, log it and put it into templates. What
they carry for a compressed passage is a placeholder, and the LLM puts the passage back in its place::

    [[nutgraf:<store>-<request>-<number>:<slots>:<tag>]]

The tag is a MAC under the store's secret, so that nobody can make a placeholder up: what only looks like one stays the
text that it is. It grows with the number of slots, so that a framework that counts a placeholder's own text tokens charges
at least about as many as the passage will take.

A copy of a genuine placeholder, taken from a log for instance, is a key to a passage, and three things limit what it opens:

* each request gets placeholders of its own, which are forgotten after ``max_age`` seconds or ``max_requests`` requests, so
  that nothing written before the request was made (no document in the index, no question) can hold one of them;
* `CompressedContextPostprocessor` refuses a question that holds one, and escapes the placeholders in all text that it
  hands to the LLM; compressed text is never searched for placeholders at all;
* a placeholder opens a passage for the reader that it was compressed for alone.

What remains: someone who sees the prompts of a running process, within ``max_age``, and whose text reaches the LLM by a
path without that postprocessor (a chat engine that first rewrites the question, an ``llm.complete`` of one's own). Run
`escape_placeholders` over such text.
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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...compressors import CompressedPassage
from .cache import PassageCache

MARKER = "[[nutgraf:"
_PLACEHOLDER = re.compile(r"\[\[nutgraf:([0-9a-f]{8})-([0-9a-f]{12})-([0-9]{1,5}):([0-9]{1,7}):([A-Za-z0-9_-]+)\]\]")
_HEAD = re.compile(r"\[\[nutgraf:([0-9a-f]{8})-[0-9a-f]{12}[A-Za-z0-9:_-]*")
_MIN_TAG = 22  # characters, 132 bits
_TAG_PER_SLOT = 1.6  # random base64 takes 0.7 tokens a character or more in common vocabularies
_TORN_TAG = 8  # characters of a genuine tag that give a torn placeholder away


class PlaceholderError(RuntimeError):
    """A placeholder of ours cannot be read: it was torn, has expired, or belongs to another reader.

    It is no ``ValueError`` on purpose: LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


@dataclass(frozen=True)
class Issued:
    """A passage behind a placeholder.

    Attributes:
        key: the passage's key in the store's cache.
        slots: reader positions it takes.
        reader: fingerprint of the reader it is for.
        compress: compresses the passage again, should the cache have let it go.
    """

    key: str
    slots: int
    reader: str | None
    compress: Callable[[], CompressedPassage]


@dataclass(frozen=True)
class Found:
    """A genuine placeholder in a text: how it is spelled, who issued it, its request, its number there and its slots."""

    spelled: str
    store: PlaceholderStore
    request: str
    number: int
    slots: int


class PlaceholderStore:
    """Issues placeholders for passages in a cache and finds the passages again; safe to share by threads.

    Args:
        cache: where the passages are kept; a new `PassageCache` if not given.
        max_requests: the most requests whose placeholders are remembered, with the passages' texts.
        max_age: seconds for which a placeholder can be read.
    """

    def __init__(self, cache: PassageCache | None = None, *, max_requests: int = 1024, max_age: float = 3600.0) -> None:
        if max_requests < 1 or max_age <= 0:
            raise ValueError(f"A store must remember a request for some time, got {max_requests=} and {max_age=}.")
        self.cache = PassageCache() if cache is None else cache
        self.max_requests = max_requests
        self.max_age = max_age
        self.name = secrets.token_hex(4)
        self._requests: OrderedDict[str, tuple[float, list[Issued]]] = OrderedDict()
        self._lock = threading.Lock()
        _STORES[self.name] = self

    def issue(self, passages: Sequence[Issued]) -> list[str]:
        """One new placeholder for each passage of a request."""
        request = secrets.token_hex(6)
        now = time.monotonic()
        with self._lock:
            self._requests[request] = (now + self.max_age, list(passages))
            while len(self._requests) > self.max_requests or next(iter(self._requests.values()))[0] < now:
                self._requests.popitem(last=False)
        return [self._spell(request, number, issued.slots) for number, issued in enumerate(passages)]

    def holds(self, placeholder: re.Match[str]) -> bool:
        """Whether this store issued a placeholder, be it long ago."""
        _, request, number, slots, tag = placeholder.groups()
        if len(tag) != _tag_length(int(slots)):  # before the MAC, whose cost grows with the slots claimed
            return False
        return hmac.compare_digest(placeholder.group(), self._spell(request, int(number), int(slots)))

    def open(self, found: Found, reader: str) -> CompressedPassage:
        """The passage behind a placeholder, compressed again if the cache no longer has it.

        Raises:
            PlaceholderError: if the placeholder has expired, or the passage was compressed for another reader.
        """
        issued = self._remembered(found)
        if issued.reader is not None and issued.reader != reader:
            raise PlaceholderError(
                f"A passage in the prompt was compressed for the reader {issued.reader}, but the LLM reads with {reader}; "
                "give the CompressedContextLLM and the postprocessor's compressor the same reader, the compressor's own if "
                "it tunes one: CompressedContextLLM(compressor.reader)."
            )
        passage = self.cache.get_or_compress([issued.key], lambda _: [issued.compress()])[0]
        if passage.slots != found.slots:
            raise PlaceholderError(
                f"A passage took {found.slots} slots and takes {passage.slots} now that it was compressed again; "
                "do not change the compressor between retrieval and answer."
            )
        return passage

    def torn(self, piece: str) -> bool:
        """Whether a run of a placeholder's characters is the head of one of this store's whose rest is missing."""
        request = piece[len(MARKER) + len(self.name) + 1 :][:12]
        with self._lock:
            remembered = self._requests.get(request)
        for number, issued in enumerate(remembered[1] if remembered else []):
            whole = self._spell(request, number, issued.slots)
            giveaway = whole[: whole.rindex(":") + 1 + _TORN_TAG]
            if piece.startswith(giveaway) or giveaway.startswith(piece):
                return True
        return False

    def _remembered(self, found: Found) -> Issued:
        with self._lock:
            expires, passages = self._requests.get(found.request, (0.0, []))
        if expires < time.monotonic() or found.number >= len(passages):
            raise PlaceholderError(
                f"A placeholder in the prompt has expired (they are kept for {self.max_age:g} s and {self.max_requests} "
                "requests); run the postprocessor over the nodes again."
            )
        return passages[found.number]

    def _spell(self, request: str, number: int, slots: int) -> str:
        handle = f"{self.name}-{request}-{number}:{slots}"
        length = _tag_length(slots)
        mac = hashlib.shake_256(b"placeholder:" + self.cache.secret + handle.encode())
        tag = base64.urlsafe_b64encode(mac.digest(length)).decode()[:length]
        return f"{MARKER}{handle}:{tag}]]"


def _tag_length(slots: int) -> int:
    return max(_MIN_TAG, round(_TAG_PER_SLOT * slots))


_STORES: weakref.WeakValueDictionary[str, PlaceholderStore] = weakref.WeakValueDictionary()
_SHARED: weakref.WeakValueDictionary[str, PlaceholderStore] = weakref.WeakValueDictionary()
_SHARING = threading.Lock()


def shared_store(reader: str) -> PlaceholderStore:
    """The store that all adapters for a reader share unless told otherwise; it lives as long as one of them holds it.

    Args:
        reader: the reader's fingerprint.
    """
    with _SHARING:
        store = _SHARED.get(reader)
        if store is None:
            store = _SHARED[reader] = PlaceholderStore()
        return store


def scan(text: str) -> Iterator[str | Found]:
    """Cuts a text at the genuine placeholders of every living store; all else, lookalikes included, stays text."""
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
    """A prompt with its placeholders replaced by their passages.

    Args:
        text: the prompt, or a piece of it.
        reader: fingerprint of the reader that is to read it.

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
    """Whether a text holds a genuine placeholder, whole or torn."""
    return MARKER in text and any(isinstance(piece, Found) or holds_torn(piece) for piece in scan(text))


def holds_torn(text: str) -> bool:
    """Whether a text without whole placeholders holds the head of a torn one."""
    for match in _HEAD.finditer(text):
        store = _STORES.get(match[1])
        if store is not None and store.torn(match.group()):
            return True
    return False


def escape_placeholders(text: str) -> str:
    """The text with everything that looks like a placeholder made harmless (by a space), for text that others wrote."""
    return text.replace(MARKER, "[ [nutgraf:")


class ReadingLLM:
    """Says that an LLM in this process reads placeholders, for as long as the LLM holds on to it.

    Args:
        reader: fingerprint of the LLM's reader.
        window: positions that a prompt and its answer may take; ``None``: no bound is known.
        num_output: positions of these that are kept for the answer.
    """

    def __init__(self, reader: str, window: int | None, num_output: int) -> None:
        self.reader = reader
        self.window = window
        self.num_output = num_output
        _READING.add(self)

    @staticmethod
    def of(reader: str | None) -> list[ReadingLLM]:
        """The living LLMs with a reader."""
        return [llm for llm in list(_READING) if llm.reader == reader]


_READING: weakref.WeakSet[ReadingLLM] = weakref.WeakSet()
