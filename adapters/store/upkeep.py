"""Upkeep of a `LanceStore`: verify, compact, copy in another encoding, recompress."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...compressors import Compressor
from .base import Facts, Maker, PassageKey, PassageStore, StoreError, batched, documents, joined, sha256
from .encryption import Cipher, WrongKeyError, unpacked
from .fill import Filled, fill, keys_for
from .lance import LanceStore
from .rows import KEY, key_of
from .table import of_maker, quoted

_BATCH_BYTES = 2**26  # of slots copied at a time
_BATCH = 256
_WORTH = 0.75  # a slab with a smaller used share is rewritten
_SMALL = 16  # slabs below 1/16 of the largest size are joined


@dataclass(frozen=True)
class Problem:
    """A damaged passage: its key in the table and what is wrong."""

    key: str
    what: str


@dataclass(frozen=True)
class Compacted:
    """Result of `compact`: bytes of the slabs before and after, and duplicate rows removed."""

    before: int
    after: int
    duplicates: int


def verify(store: LanceStore, *, drop: bool = False, done: Callable[[int], None] | None = None) -> list[Problem]:
    """Read every passage and compare it with its checksum, key and text.

    ``drop`` deletes damaged passages, so that they can be compressed again; ``done`` is called with the number checked.

    Raises:
        StoreError: if the table cannot be read, or with ``drop``, if the store is read-only.
        WrongKeyError: if a passage is encrypted with a key that is not given; nothing is deleted then.
    """
    problems = []
    for rows in store._table.batches(["key", *store._columns()[1:]]):
        problems += [Problem(row["key"], what) for row in rows if (what := _wrong_with(store, row))]
        if done is not None:
            done(len(rows))
    if drop and problems:
        _refuse_read_only(store)
        for some in batched(problems, _BATCH):
            store._table.delete(f"key IN ({', '.join(quoted(problem.key) for problem in some)})")
        store._forget()
    return problems


def _wrong_with(store: LanceStore, row: dict[str, Any]) -> str | None:
    if key_of(row).id != row["key"]:
        return "its row names another key"
    try:
        entry = store._entry(row)
    except WrongKeyError:
        raise
    except (StoreError, ValueError) as error:
        return str(error)
    if entry.text is not None and sha256(entry.text) != row["text_hash"]:
        return "its text is not the one that it was made of"
    if (entry.passage.slots, entry.passage.source_tokens) != (row["slots"], row["source_tokens"]):
        return "its row names another length"
    return None


def compact(store: LanceStore, keep_hours: float = 24.0) -> Compacted:
    """Remove duplicate rows and unreferenced slots, join small files, update the index.

    Other processes may read and write meanwhile; slabs of active writers are not touched.

    Versions of the table younger than ``keep_hours`` stay, for readers that use them.

    Raises:
        StoreError: if the store cannot be written, is damaged, or another process is compacting it.
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
    ids = Counter(store._table.column_table(["key"])["key"].to_pylist())
    for keys in batched([key for key, number in ids.items() if number > 1], _BATCH):
        found = store._table.look_up(keys, KEY)
        store._write_facts(store.facts(map(key_of, found)))  # one row may lack what the other one holds
    seen: set[str] = set()
    twice = []
    for row in store._table.column_table(["key", "_rowid"]).to_pylist():
        if row["key"] in seen:
            twice.append(row)
        seen.add(row["key"])
    for rows in batched(twice, _BATCH):
        # With the key, because row numbers change when another process rewrites the table.
        some = (f"(_rowid = {r['_rowid']} AND key = {quoted(r['key'])})" for r in rows)
        store._table.delete(" OR ".join(some))
    return len(twice)


def _rewrite_slabs(store: LanceStore) -> None:
    slabs = store._slabs
    with slabs.idle() as idle:
        store._table.refresh()  # after locking, to see the last commits of their writers
        rows = store._table.column_table(["key", "slab", "start", "nbytes"], "slab IS NOT NULL").to_pylist()
        used: dict[str, int] = {}
        for row in rows:
            used[row["slab"]] = used.get(row["slab"], 0) + row["nbytes"]
        sizes = {name: size for name, size in slabs.sizes().items() if name in idle}
        move = {name for name, size in sizes.items() if name in used and used[name] < _WORTH * size}
        small = {name for name, size in sizes.items() if name in used and size < slabs.max_bytes // _SMALL}
        move |= small if len(small) > 1 else set()
        moving = (row for row in rows if row["slab"] in move)
        for batch in batched(moving, _BATCH_BYTES, lambda row: row["nbytes"]):
            places = slabs.append([slabs.read(row["slab"], row["start"], row["nbytes"]) for row in batch])
            moved = [{"key": row["key"], "slab": slab, "start": start} for row, (slab, start) in zip(batch, places)]
            store._table.replace(moved, ["slab", "start"])
        for name in sizes:
            if name in move or name not in used:
                slabs.remove(name)
        slabs.roll()


def rotate(store: LanceStore, done: Callable[[int], None] | None = None) -> int:
    """Encrypt every passage anew with the first of the store's keys; return how many were sealed with another one.

    Stop it at any time, and run it again to continue: each passage has one key or the other at every moment. The old records
    stay in the slabs and in older versions of the table until `compact` with ``keep_hours=0``. Do not change the facts of
    stored passages, and do not compact a remote store, meanwhile.

    Raises:
        ValueError: if the store is not encrypted.
        StoreError: if it cannot be written, is being compacted, or a record opens with none of the keys.
    """
    _refuse_read_only(store)
    cipher = store._cipher
    if cipher is None:
        raise ValueError(f"The store {store.uri} is not encrypted: it has no keys to replace.")
    old = [
        row["key"]
        for rows in store._table.batches(["key", "header", "about"])
        for row in rows
        if not all(cipher.is_current(unpacked(row[name], row["key"])) for name in ("header", "about"))
    ]
    total = 0
    for some in batched(dict.fromkeys(old), _BATCH):
        with store._writing, _alone(store):  # `compact` moves the same bytes
            total += _reseal(store, cipher, some)
        if done is not None:
            done(len(some))
    store._forget()
    return total


def _reseal(store: LanceStore, cipher: Cipher, keys: list[str]) -> int:
    """Seal some passages with the first key, in one commit."""
    store._table.refresh()
    columns = [
        "key",
        "header",
        "about",
        "slab",
        "start",
        "nbytes",
        "crc",
        *([] if store._slabs is not None else ["data"]),
    ]
    rows = list({row["key"]: row for row in store._table.look_up(keys, columns)}.values())
    runs = []
    for row in rows:
        key, run = row["key"], row.get("data") or b""
        if row["slab"] is not None:
            run = store._slabs.read(row["slab"], row["start"], row["nbytes"])
        if run:
            run = cipher.seal(bytes(cipher.open(run, f"{key}/slots")), f"{key}/slots")
        row |= {"nbytes": len(run), "crc": zlib.crc32(run)}
        for name, record in (("header", "header"), ("about", "facts")):
            row[name] = cipher.seal_text(cipher.open_text(row[name], f"{key}/{record}"), f"{key}/{record}")
        runs.append(run)
    store._place(rows, runs)
    if rows:
        store._table.replace(
            rows, [name for name in rows[0] if name != "key" and (name != "data" or store._slabs is None)]
        )
    return len(rows)


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
    """Copy all entries into another store, in its encoding; return their number. Can be repeated."""
    total = 0
    for batch in batched(source.entries(), _BATCH):
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
    """Compress the texts of a store with another compressor, or for another reader, and add the results.

    Entries without a text, or made for a question, are skipped. Passages of that compressor stored already get what is
    stored of their texts with other compressors and missing with them.
    """
    total = Filled()
    seen: set[PassageKey] = set()
    for batch in batched(store.entries(), _BATCH):
        given = [entry for entry in batch if entry.text is not None and entry.key.query is None]
        keys = keys_for(compressor, [entry.text or "" for entry in given], ratio=ratio)
        facts: dict[PassageKey, Facts] = {}
        for key, entry in zip(keys, given):
            facts[key] = facts[key].over(entry.facts) if key in facts else entry.facts
        missing = store.missing(facts)
        store.describe(facts, keep=True)
        total += Filled(found=len(facts.keys() - seen - set(missing)))
        seen |= facts.keys()
        total += fill(
            store,
            compressor,
            [facts[key].text or "" for key in missing],
            ratio=ratio,
            vectors=[facts[key].vector for key in missing],
            abouts=[facts[key].about for key in missing],
            batch_size=batch_size,
            done=done,
        )
    return total


def forget(store: PassageStore, **about: Any) -> int:
    """Delete the passages whose stored facts have these values; return their number.

    ``forget(store, file="a.jsonl")`` for a corpus, ``forget(store, ref_doc_id="doc-1")`` for a document of LlamaIndex. A
    passage that other documents hold too stays for them.

    Raises:
        ValueError: without facts.
        StoreError: if the store cannot be read or written.
    """
    if not about:
        raise ValueError("Name at least one stored fact of the passages to delete, such as file='a.jsonl'.")
    wanted = {name: str(value) for name, value in about.items()}  # a command line knows no numbers
    gone: list[PassageKey] = []
    left: dict[PassageKey, Facts] = {}
    for entry in store.entries():
        held = documents(entry.about)
        others = [facts for facts in held if not wanted.items() <= {n: str(v) for n, v in facts.items()}.items()]
        if len(others) == len(held):
            continue
        if others:
            left[entry.key] = replace(entry.facts, about=joined(others))
        else:
            gone.append(entry.key)
    if left:
        store._replace_facts(left)
    return store.delete(gone) + len(left)


def drop(store: LanceStore, maker: Maker) -> None:
    """Delete all passages of one maker; `compact` then frees their bytes."""
    _refuse_read_only(store)
    store._table.delete(of_maker(maker) or "false")
    store._forget()


def _refuse_read_only(store: LanceStore) -> None:
    if store.read_only:
        raise StoreError(f"The store {store.uri} is read-only.")
