"""Upkeep of a `LanceStore`: verify it, compact it, copy it in another encoding, compress it anew."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...compressors import Compressor
from .base import Entry, Maker, PassageStore, StoreError, sha256
from .fill import Filled, fill
from .lance import LanceStore
from .rows import key_of
from .table import of_maker, quoted

_BATCH_BYTES = 2**26  # of slots copied at a time
_BATCH = 256
_WORTH = 0.75  # a slab of which less than this is used is rewritten
_SMALL = 16  # slabs below a 16th of the largest size are joined


@dataclass(frozen=True)
class Problem:
    """A damaged passage: its key in the table and what is wrong."""

    key: str
    what: str


@dataclass(frozen=True)
class Compacted:
    """What `compact` did: bytes of the slabs before and after, and rows that were stored twice."""

    before: int
    after: int
    duplicates: int


def verify(store: LanceStore, *, drop: bool = False, done: Callable[[int], None] | None = None) -> list[Problem]:
    """Reads every passage and compares it with its checksum, its key and its text.

    Args:
        store: the store.
        drop: delete the damaged ones, so that they can be compressed again.
        done: is told the number of passages looked at, batch by batch.

    Raises:
        StoreError: if the table itself cannot be read, or ``drop`` is asked of a store that is read-only.
    """
    problems = []
    for rows in store._table.batches(["key", *store._columns()[1:]]):
        problems += [Problem(row["key"], what) for row in rows if (what := _wrong_with(store, row))]
        if done is not None:
            done(len(rows))
    if drop and problems:
        _refuse_read_only(store)
        keys = [problem.key for problem in problems]
        for start in range(0, len(keys), _BATCH):
            store._table.delete(f"key IN ({', '.join(map(quoted, keys[start : start + _BATCH]))})")
        store._forget()
    return problems


def _wrong_with(store: LanceStore, row: dict[str, Any]) -> str | None:
    if key_of(row).id != row["key"]:
        return "its row names another key"
    try:
        entry = store._entry(row)
    except (StoreError, ValueError) as error:
        return str(error)
    if entry.text is not None and sha256(entry.text) != row["text_hash"]:
        return "its text is not the one that it was made of"
    if (entry.passage.slots, entry.passage.source_tokens) != (row["slots"], row["source_tokens"]):
        return "its row names another length"
    return None


def compact(store: LanceStore, keep_hours: float = 24.0) -> Compacted:
    """Removes rows that are there twice and slots that nobody points at, joins small files, brings the index up to date.

    Others may read and write meanwhile; the slabs of living writers are left alone.

    Args:
        store: the store.
        keep_hours: versions of the table younger than this stay, for readers that hold on to them.

    Raises:
        StoreError: if the store cannot be written, is damaged, or is being compacted by somebody else.
    """
    _refuse_read_only(store)
    with store._writing, _alone(store):
        store._table.refresh()
        duplicates = _drop_duplicates(store)
        before = sum(store._slabs.sizes().values()) if store._slabs is not None else 0
        if store._slabs is not None:
            _rewrite_slabs(store)
        store._table.optimize(timedelta(hours=keep_hours))
        store._forget()
        after = sum(store._slabs.sizes().values()) if store._slabs is not None else 0
    return Compacted(before, after, duplicates)


def _drop_duplicates(store: LanceStore) -> int:
    seen: set[str] = set()
    twice = []
    for row in store._table.column_table(["key", "_rowid"]).to_pylist():
        if row["key"] in seen:
            twice.append(row)
        seen.add(row["key"])
    for start in range(0, len(twice), _BATCH):
        # The key stands beside the row's number, as numbers change when somebody else rewrites the table meanwhile.
        some = (f"(_rowid = {r['_rowid']} AND key = {quoted(r['key'])})" for r in twice[start : start + _BATCH])
        store._table.delete(" OR ".join(some))
    return len(twice)


def _rewrite_slabs(store: LanceStore) -> None:
    slabs = store._slabs
    with slabs.idle() as idle:
        store._table.refresh()  # after the locks: what their last writers committed is seen
        rows = store._table.column_table(["key", "slab", "start", "nbytes"], "slab IS NOT NULL").to_pylist()
        used: dict[str, int] = {}
        for row in rows:
            used[row["slab"]] = used.get(row["slab"], 0) + row["nbytes"]
        sizes = {name: size for name, size in slabs.sizes().items() if name in idle}
        move = {name for name, size in sizes.items() if name in used and used[name] < _WORTH * size}
        small = {name for name, size in sizes.items() if name in used and size < slabs.max_bytes // _SMALL}
        move |= small if len(small) > 1 else set()
        for batch in _by_bytes(row for row in rows if row["slab"] in move):
            places = slabs.append([slabs.read(row["slab"], row["start"], row["nbytes"]) for row in batch])
            moved = [{"key": row["key"], "slab": slab, "start": start} for row, (slab, start) in zip(batch, places)]
            store._table.replace(moved, ["slab", "start"])
        for name in sizes:
            if name in move or name not in used:
                slabs.remove(name)
        slabs.roll()


def _by_bytes(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row["nbytes"]
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _alone(store: LanceStore) -> Iterator[None]:
    """One compaction of a local store at a time."""
    if store._slabs is None:
        yield
        return
    import fcntl

    path = Path(store.uri) / ".compacting"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StoreError(f"The store {store.uri} cannot be compacted: {error.strerror}.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise StoreError(f"The store {store.uri} is being compacted by another process; wait for it.") from error
    try:
        yield
    finally:
        os.close(handle)


def copy(source: PassageStore, target: PassageStore, done: Callable[[int], None] | None = None) -> int:
    """Puts all entries of a store into another, in that one's encoding; how many there were. It can be run again."""
    total = 0
    for batch in _batches(source.entries()):
        target.put_many(batch)
        total += len(batch)
        if done is not None:
            done(len(batch))
    return total


def recompress(
    store: PassageStore,
    compressor: Compressor,
    *,
    ratio: float | None = None,
    batch_size: int | None = None,
    done: Callable[[int], None] | None = None,
) -> Filled:
    """Compresses the texts of a store with another compressor (or for another reader) beside what is there.

    Entries whose text was not kept, or that were made for a question, are passed over.
    """
    total = Filled()
    seen: set[str] = set()
    for batch in _batches(store.entries()):
        texts: list[Entry] = []
        for entry in batch:
            if entry.text is not None and entry.key.query is None and entry.key.text not in seen:
                seen.add(entry.key.text)
                texts.append(entry)
        total += fill(
            store,
            compressor,
            [entry.text or "" for entry in texts],
            ratio=ratio,
            vectors=[entry.vector for entry in texts],
            abouts=[entry.about for entry in texts],
            batch_size=batch_size,
            done=done,
        )
    return total


def drop(store: LanceStore, maker: Maker) -> None:
    """Deletes all passages of one maker; `compact` then frees their bytes."""
    _refuse_read_only(store)
    store._table.delete(of_maker(maker) or "false")
    store._forget()


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _refuse_read_only(store: LanceStore) -> None:
    if store.read_only:
        raise StoreError(f"The store {store.uri} is read-only.")
