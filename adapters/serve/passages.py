"""Passages of a server: read by id from a store, compressed from text when first seen, added, listed and deleted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...compressors import CompressedPassage, Compressor, Reader
from ..placeholders import PassageCache
from ..placeholders.source import PassageSource
from ..store import Listed, PassageStore, StoreError, fill, keys_for
from .errors import RequestError

_log = logging.getLogger(__name__)
_MOST_LISTED = 1000
_TEXTS = "This server compresses no texts: start it with --compressor, or send the text as a text."


@dataclass(frozen=True)
class PassageRef:
    """A passage that a prompt names, by id or by its text.

    Attributes:
        where: the request's field, for error messages.
        id: id of a stored passage.
        text: the passage itself.
        query: the question, for a query-aware compressor.
    """

    where: str
    id: str | None = None
    text: str | None = None
    query: str | None = None

    @classmethod
    def of(cls, part: Mapping[str, Any], where: str, param: str) -> PassageRef:
        """Read a part ``{"type": "passage", "id": ...}`` or ``{"type": "passage", "text": ..., "query": ...}``."""
        given = {name: value for name, value in part.items() if name != "type" and value is not None}
        if other := sorted(given.keys() - {"id", "text", "query"}):
            raise RequestError(f"{where}.{other[0]:.60} is not served here; leave it out.", 400, param)
        if bad := [name for name, value in given.items() if not isinstance(value, str)]:
            raise RequestError(f"{where}.{bad[0]} must be a string, got {given[bad[0]]!r:.60}.", 400, param)
        if ("id" in given) == ("text" in given) or ("id" in given and "query" in given):
            raise RequestError(f'{where} needs either "id", or "text" and perhaps "query".', 400, param)
        return cls(where, **given)


class NewPassage(BaseModel):
    """A text to compress and store, and the caller's facts about it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str
    about: dict[str, Any] | None = None


class NewPassages(BaseModel):
    """``POST /v1/passages``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    passages: list[NewPassage] = Field(min_length=1, max_length=1024)


class Passages:
    """Compressed passages for the prompts of a server. Thread-safe.

    Args:
        compressor: compresses texts; ``None``: passages are read by id only.
        store: passages by id; new ones are added unless it is read-only. ``None``: texts are kept in memory only.
        ratio: compression ratio L / l; default: the compressor's own.
        count: called with ``"by_id"``, ``"found"`` (a text seen before) or ``"compressed"``, and a number of passages.
    """

    def __init__(
        self,
        compressor: Compressor | None,
        store: PassageStore | None,
        ratio: float | None = None,
        count: Callable[[str, int], None] = lambda source, number: None,
    ) -> None:
        self.compressor = compressor
        self.store = store
        self.ratio = ratio
        self._count = count
        self._cache = PassageCache()
        self._source = None if compressor is None else PassageSource(compressor, self._cache, store)

    def resolve(self, refs: Sequence[PassageRef], param: str) -> dict[PassageRef, CompressedPassage]:
        """Return the passages that are named.

        Raises:
            RequestError: 404 for an unknown id, 400 for a text that cannot be compressed, 500 if the store cannot be read.
        """
        found = self._by_id([ref for ref in refs if ref.id is not None], param)
        by_query: dict[str | None, list[PassageRef]] = {}
        for ref in dict.fromkeys(ref for ref in refs if ref.text is not None):
            by_query.setdefault(ref.query, []).append(ref)
        for query, some in by_query.items():
            found |= zip(some, self._of_texts(some, query, param))
        return found

    def _by_id(self, refs: Sequence[PassageRef], param: str) -> dict[PassageRef, CompressedPassage]:
        if not refs:
            return {}
        store = self._opened(param)
        ids = [str(ref.id) for ref in refs]
        try:
            keys = {name: one.key for name, one in store.listed(ids).items()}
            passages = dict(zip(keys, store.get_many(list(keys.values()))))
        except StoreError as error:
            raise _unreadable(error) from error
        out = {}
        for ref in refs:
            passage = passages.get(str(ref.id))
            if passage is None:
                raise RequestError(f"{ref.where}: there is no passage {ref.id!r:.80}; add it first.", 404, param)
            out[ref] = passage
        self._count("by_id", len(refs))
        return out

    def _of_texts(self, refs: Sequence[PassageRef], query: str | None, param: str) -> list[CompressedPassage]:
        if self.compressor is None or self._source is None:
            raise RequestError(f"{refs[0].where}: {_TEXTS}", 400, param)
        if query is None and self.compressor.query_aware:
            raise RequestError(
                f'{refs[0].where} needs "query", the question: this server\'s compressor compresses for it.', 400, param
            )
        query = query if self.compressor.query_aware else None  # otherwise one text is one passage
        try:
            passages, new = self._source.get([str(ref.text) for ref in refs], query=query, ratio=self.ratio)
        except StoreError as error:
            raise _unreadable(error) from error
        except ValueError as error:
            raise RequestError(f"{refs[0].where}: {error}", 400, param) from error
        self._count("compressed", new)
        self._count("found", len(refs) - new)
        return passages

    def add(self, new: NewPassages) -> list[dict[str, Any]]:
        """Compress and store texts; on return they are on disk. Stored ones are only described anew.

        Raises:
            RequestError: 507 if they cannot be written; then repeat the whole request later.
        """
        store = self._opened("passages")
        if self.compressor is None:
            raise RequestError(_TEXTS, 400, "passages")
        if self.compressor.query_aware:
            raise RequestError(
                "This server's compressor compresses for a question, so passages cannot be stored ahead: send text and "
                "query with each prompt.",
                400,
                "passages",
            )
        if store.read_only:
            raise RequestError("This server's store is read-only.", 403, "passages")
        texts = [one.text for one in new.passages]
        try:
            filled = fill(store, self.compressor, texts, ratio=self.ratio, abouts=[one.about for one in new.passages])
            keys = keys_for(self.compressor, texts, ratio=self.ratio)
            listed = store.listed([key.id for key in keys])
        except StoreError as error:
            raise _unwritable(error) from error
        except ValueError as error:
            raise RequestError(str(error), 400, "passages") from error
        self._count("compressed", filled.compressed)
        if gone := [key.id for key in keys if key.id not in listed]:
            raise RequestError(f"{len(gone)} passages were deleted while they were added; add them again.", 409)
        return [shown(listed[key.id]) for key in keys]

    def page(self, after: str, limit: int) -> dict[str, Any]:
        """Return up to ``limit`` (at most 1,000) stored passages whose ids follow ``after``, in the order of their ids."""
        store = self._opened("limit")
        if not 1 <= limit <= _MOST_LISTED:
            raise RequestError(f"limit must be 1 to {_MOST_LISTED:,}, got {limit}.", 400, "limit")
        try:
            ids = store.ids(after, limit + 1)
            listed = store.listed(ids[:limit])
        except StoreError as error:
            raise _unreadable(error) from error
        data = [shown(listed[name]) for name in ids[:limit] if name in listed]  # one may just have been deleted
        more = {"has_more": len(ids) > limit, "last_id": ids[:limit][-1] if ids else None}
        return {"object": "list", "data": data, **more}

    def one(self, name: str) -> dict[str, Any]:
        """Return a stored passage's facts."""
        return shown(self._listed(name))

    def delete(self, name: str) -> dict[str, Any]:
        """Delete a stored passage; on return it is gone from the disk and from this server's memory."""
        key = self._listed(name).key
        store = self._opened("id")
        if store.read_only:
            raise RequestError("This server's store is read-only.", 403, "id")
        try:
            store.delete([key])
        except StoreError as error:
            raise _unwritable(error) from error
        self._cache.discard(key)
        return {"id": name, "object": "passage.deleted", "deleted": True}

    def _listed(self, name: str) -> Listed:
        try:
            found = self._opened("id").listed([name]).get(name)
        except StoreError as error:
            raise _unreadable(error) from error
        if found is None:
            raise RequestError(f"There is no passage {name!r:.80}.", 404, "id")
        return found

    def _opened(self, param: str) -> PassageStore:
        if self.store is None:
            raise RequestError("This server has no store of passages: start it with --store.", 400, param)
        return self.store


def shown(one: Listed) -> dict[str, Any]:
    """Return a stored passage as JSON."""
    return {
        "id": one.key.id,
        "object": "passage",
        "interface": one.interface,
        "source_tokens": one.source_tokens,
        "slots": one.slots,
        "bytes": one.nbytes,
        "compressor": one.key.compressor,
        "ratio_asked": one.key.ratio,
        "about": json.loads(json.dumps(one.about), parse_constant=lambda number: None),  # JSON has no NaN
    }


def check_fits(reader: Reader, compressor: Compressor | None) -> None:
    """Raise ``ValueError`` if a compressor's passages are for another reader."""
    if (
        compressor is not None
        and compressor.interface != "text"
        and compressor.reader.fingerprint != reader.fingerprint
    ):
        raise ValueError(
            f"The compressor makes passages for the reader {compressor.reader.fingerprint}, but {reader.name!r} is "
            f"{reader.fingerprint}: serve compressor.reader."
        )


def _unreadable(error: StoreError) -> RequestError:
    _log.error("The store cannot be read", exc_info=error)
    return RequestError("A stored passage cannot be read; the server's log says why.", 500)


def _unwritable(error: StoreError) -> RequestError:
    _log.error("The store cannot be written", exc_info=error)
    return RequestError(
        "The server's store cannot be written, perhaps because its disk is full; nothing of this request is sure to be "
        "stored. The server's log says why.",
        507,
    )
