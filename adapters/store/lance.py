"""`LanceStore`: compressed passages in a LanceDB table, with their texts and retrieval vectors.

Layout of a local store::

    passages.lance/   the table: one row per passage with the place and checksum of its slots
    slabs/*.slab      the slots (see `nutgraf.adapters.store.slabs`)

Slots are kept outside the table because that is faster (benchmarks/results/store.jsonl). Object storage has no files to map,
so there the slots are in the table. A put first writes and syncs the slots, then commits all rows or none: acknowledged
passages survive a kill, and others are never visible.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import secrets
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...compressors import CompressedPassage
from .base import Entry, Facts, Hit, Listed, Maker, PassageKey, PassageStore, StoreError, StoreStats, batched, merged
from .codec import Encoding, decode, encode
from .encryption import VARIABLE, Cipher, Keys
from .rows import KEY, PLACE, Place, facts_of, key_of, row_of, text_columns
from .table import FIELDS, VECTOR, PassageTable, of_maker, quoted, writable

Layout = Literal["slabs", "table"]
_MAX_REFS = 2**16
FOLLOW_S = 1.0  # seconds after which a reader looks for what other processes have deleted or moved


class LanceStore(PassageStore):
    """Compressed passages on disk or object storage. Safe to share between threads and processes.

    A passage that another process deletes can be read for another second.

    Args:
        uri: a folder, or a URI for LanceDB (``s3://...``).
        dtype, quantize, group: encoding of the slots, see `Encoding`; fixed when the store is made. Default: that of the
            existing store, or as the compressor makes them.
        layout: ``"slabs"`` or ``"table"``; default: slabs in a folder, the table elsewhere.
        read_only: refuse `put_many`; always true for a folder without write permission.
        create: make the store if it does not exist.
        keys: make an encrypted store, or open one: its key, or several, of which the first one encrypts (see
            `nutgraf.adapters.store.encryption`). Default: those in the environment variable NUTGRAF_STORE_KEY, if it is set; a
            new store is then encrypted.
        encrypt: ``False`` makes a plain store even so, ``True`` refuses one.
        storage_options: LanceDB's options for object storage.

    Raises:
        ValueError: if the settings differ from those of the existing store, or an encrypted one is opened without a key.
        StoreError: if it cannot be opened.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        group: int | None = None,
        layout: Layout | None = None,
        read_only: bool = False,
        create: bool = True,
        keys: Keys | None = None,
        encrypt: bool | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self.uri = os.fspath(uri)
        wanted = Encoding(dtype, quantize, 64 if group is None else group)
        local = "://" not in self.uri
        if layout not in (None, "slabs", "table"):
            raise ValueError(f'layout must be "slabs" or "table", got {layout!r}.')
        if layout == "slabs" and not local:
            raise ValueError(f'Slabs are mapped files, which {self.uri} cannot have; use layout="table".')
        settings: dict[str, Any] = {
            "name": secrets.token_hex(8),
            "layout": layout or ("slabs" if local and os.name == "posix" else "table"),
            "encoding": dataclasses.asdict(wanted),
        }
        must = keys is not None or encrypt is True
        cipher: Cipher | None = None  # made first, so that a wrong key makes no store
        if must or (encrypt is None and os.environ.get(VARIABLE)):
            cipher, settings["encrypted"] = Cipher(keys), True
        self._options, self._keys = storage_options, keys
        self.read_only = read_only or not writable(self.uri)
        self._table = PassageTable(self.uri, settings, create=create and not self.read_only, options=storage_options)
        self.encoding = Encoding(**self._table.settings["encoding"])
        self.encrypted = bool(self._table.settings.get("encrypted"))
        if must and not self.encrypted:
            raise ValueError(
                f"The store {self.uri} is not encrypted; open it without keys, or copy it into an encrypted one: "
                f"nutgraf store migrate {self.uri} --to NEW with {VARIABLE} set."
            )
        if not self.encrypted and not self.read_only and os.environ.get(VARIABLE):
            warnings.warn(f"{VARIABLE} is set, but the store {self.uri} is not encrypted.", stacklevel=2)
        self._cipher = (cipher or Cipher(keys)) if self.encrypted else None
        if (dtype or quantize or group) and wanted != self.encoding:
            raise ValueError(
                f"The store {self.uri} holds slots {self.encoding}, not {wanted}; open it without these settings, "
                f"or copy it: nutgraf store migrate {self.uri} --to NEW --quantize int8."
            )
        if layout is not None and layout != self._table.settings["layout"]:
            raise ValueError(f"The store {self.uri} has the layout {self._table.settings['layout']!r}, not {layout!r}.")
        self.layout: Layout = self._table.settings["layout"]
        self._address = self.uri if "://" in self.uri else os.path.abspath(self.uri)
        self.name = f"{self._address}#{self._table.settings['name']}"
        self._slabs: Any = None
        if self.layout == "slabs":
            from .slabs import Slabs  # POSIX only

            self._slabs = Slabs(Path(self.uri) / "slabs")
        self._refs: OrderedDict[str, Place] = OrderedDict()
        self._followed = time.monotonic()
        self._key_fits = False  # it opened a record
        self._lock = threading.Lock()  # guards the refs; held briefly
        self._writing = threading.Lock()

    def __reduce__(self) -> Any:  # a worker process may run in another folder
        opened = functools.partial(
            LanceStore, read_only=self.read_only, create=False, keys=self._keys, storage_options=self._options
        )
        return opened, (self._address,)

    def get_many(self, keys: Sequence[PassageKey]) -> list[CompressedPassage | None]:
        found = self._read(keys, self._find(keys))
        return [found.get(key.id) for key in keys]

    def _read(self, keys: Sequence[PassageKey], refs: dict[str, Any]) -> dict[str, CompressedPassage]:
        out: dict[str, CompressedPassage] = {}
        for key in keys:
            if key.id in out or key.id not in refs:
                continue
            try:
                out[key.id] = self._passage(key, *refs[key.id])
            except StoreError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                self._forget()  # another process has compacted the store
                again = self._find([key])
                if key.id in again:
                    out[key.id] = self._passage(key, *again[key.id])
        return out

    def _find(self, keys: Iterable[PassageKey]) -> dict[str, tuple[Place, bytes | None]]:
        """Places of the passages by key: from memory, else from the table, which is refreshed for unknown keys."""
        wanted = list(dict.fromkeys(key.id for key in keys))
        found: dict[str, tuple[Place, bytes | None]] = {}
        self._follow()
        with self._lock:
            for key in wanted:
                if (ref := self._refs.get(key)) is not None:
                    self._refs.move_to_end(key)
                    found[key] = (ref, None)
        columns = ("key", *PLACE) if self._slabs is not None else ("key", *PLACE, "data")
        for fresh in (False, True):
            unknown = [key for key in wanted if key not in found]
            if not unknown or (fresh and not self._table.refresh()):
                break
            for row in self._table.look_up(unknown, columns):
                ref = Place.of(row, self._cipher)
                found[row["key"]] = (ref, row.get("data"))
                if self._slabs is not None:
                    self._remember(row["key"], ref)
        return found

    def _passage(self, key: PassageKey, ref: Place, data: bytes | None) -> CompressedPassage:
        if ref.slab is not None:
            run: Any = self._slabs.read(ref.slab, ref.start, ref.nbytes)
        else:
            run = bytearray(data or b"")  # torch wants a writable buffer
        if not ref.known_good and (len(run) != ref.nbytes or zlib.crc32(run) != ref.crc):
            raise StoreError(
                f"The passage {key.id} of the store {self.uri} is damaged: its checksum is wrong. "
                "Run `nutgraf store verify DIR --drop`, then compress the lost passages again."
            )
        if ref.header.get("compressor") != key.compressor or ref.header.get("reader") not in (None, key.reader):
            raise StoreError(f"The passage {key.id} of the store {self.uri} was made by another compressor or reader.")
        if self._cipher is not None and ref.nbytes:
            run = self._cipher.open(run, f"{key.id}/slots")
        passage = decode(ref.header, run)
        if not ref.known_good:
            passage.check()
            ref.known_good = True
        return passage

    def _remember(self, key: str, ref: Place) -> None:
        with self._lock:
            self._refs[key] = ref
            while len(self._refs) > _MAX_REFS:
                self._refs.popitem(last=False)

    def _forget(self) -> None:
        with self._lock:
            self._refs.clear()
        self._table.refresh()

    def _follow(self) -> None:
        """See what other processes have deleted or moved, if the last look is too long ago."""
        now = time.monotonic()
        if now - self._followed >= FOLLOW_S:
            self._followed = now
            if self._table.refresh():
                with self._lock:
                    self._refs.clear()

    def missing(self, keys: Iterable[PassageKey]) -> list[PassageKey]:
        distinct = list(dict.fromkeys(keys))
        self._table.refresh()  # what another process has deleted must be stored again
        stored = {row["key"] for row in self._table.look_up([key.id for key in distinct], ["key"])}
        return [key for key in distinct if key.id not in stored]

    def put_many(self, entries: Sequence[Entry]) -> None:
        self._check_writable()
        distinct = merged(entries)
        encoded = {key: self._encoded(entry) for key, entry in distinct.items()}
        with self._writing:
            new = self.missing(distinct)
            if new:
                vectors = self._vector_columns([distinct[key].facts for key in new])
                rows = [
                    row_of(distinct[key], *encoded[key], self._cipher) | vector for key, vector in zip(new, vectors)
                ]
                self._place(rows, [encoded[key][1] for key in new])
                self._table.add(rows)
        if len(new) < len(distinct):
            self.describe({key: entry.facts for key, entry in distinct.items() if key not in set(new)})

    def _encoded(self, entry: Entry) -> tuple[str, bytes]:
        """Header and bytes of a passage; the bytes are sealed if the store is encrypted."""
        header, data = encode(entry.passage, self.encoding)
        return header, self._cipher.seal(data, f"{entry.key.id}/slots") if self._cipher is not None and data else data

    def _check_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"The store {self.uri} is read-only: it was opened so, or its folder may not be written.")
        if self._cipher is not None and not self._key_fits and (row := self._table.sample(["key", "header"])):
            Place.of(
                {**dict.fromkeys(PLACE), **row}, self._cipher
            )  # a wrong key must not write what the right one cannot read
            self._key_fits = True

    def _vector_columns(self, facts: Sequence[Facts]) -> list[dict[str, Any]]:
        """The column of retrieval vectors, if there are any; the table gets one."""
        sizes = {len(one.vector) for one in facts if one.vector is not None}
        if len(sizes) > 1:
            raise ValueError(f"Retrieval vectors of one store have one size, got {sorted(sizes)}.")
        if self._cipher is not None:
            return [{} for _ in facts]  # sealed with the other facts
        if sizes:
            self._table.hold_vectors(*sizes)
        return [{VECTOR: one.vector} if sizes else {} for one in facts]

    def facts(self, keys: Iterable[PassageKey]) -> dict[PassageKey, Facts]:
        by_id = {key.id: key for key in keys}
        self._table.refresh()
        columns = ["key", "text", "about", *([VECTOR] if self._table.vector_size else [])]
        found: dict[PassageKey, Facts] = {}
        for row in self._table.look_up(list(by_id), columns):
            key, facts = by_id[row["key"]], facts_of(row, row.get(VECTOR), self._cipher)
            found[key] = facts.over(found[key]) if key in found else facts  # two writers may have stored it
        return found

    def _replace_facts(self, facts: Mapping[PassageKey, Facts]) -> None:
        self._check_writable()
        with self._writing:
            self._write_facts(facts)

    def _write_facts(self, facts: Mapping[PassageKey, Facts]) -> None:
        vectors = self._vector_columns(list(facts.values()))
        rows = [
            {"key": key.id, **text_columns(one, key.id, self._cipher), **vector}
            for (key, one), vector in zip(facts.items(), vectors)
        ]
        self._table.replace(rows, [name for name in rows[0] if name != "key"])

    def delete(self, keys: Iterable[PassageKey]) -> int:
        self._check_writable()
        wanted = list(dict.fromkeys(key.id for key in keys))
        with self._writing:
            self._table.refresh()
            stored = {row["key"] for row in self._table.look_up(wanted, ["key"])}
            for some in batched(sorted(stored), 256):
                self._table.delete(f"key IN ({', '.join(map(quoted, some))})")
            self._forget()
        return len(stored)

    def _place(self, rows: list[dict[str, Any]], runs: list[bytes]) -> None:
        """Write the slots and enter their places in the rows."""
        if self._slabs is None:
            for row, run in zip(rows, runs):
                row |= {"slab": None, "start": None, "data": run}
            return
        places = iter(self._slabs.append([run for run in runs if run]))
        for row, run in zip(rows, runs):
            slab, start = next(places) if run else (None, None)
            row |= {"slab": slab, "start": start, "data": None}

    def ids(self, after: str = "", limit: int = 100) -> list[str]:
        self._table.refresh()
        return self._table.first_keys(after, limit)

    def listed(self, ids: Iterable[str]) -> dict[str, Listed]:
        wanted = list(dict.fromkeys(ids))
        sizes = ("interface", "source_tokens", "slots", "nbytes")
        columns = ["key", *KEY, *sizes, "text", "about"]
        found: dict[str, Listed] = {}
        self._follow()
        for fresh in (False, True):
            unknown = [name for name in wanted if name not in found]
            if not unknown or (fresh and not self._table.refresh()):
                break
            for row in self._table.look_up(unknown, columns):
                found[row["key"]] = Listed(
                    key_of(row), **{name: row[name] for name in sizes}, about=facts_of(row, None, self._cipher).about
                )
        return found

    def entries(self, maker: Maker | None = None) -> Iterator[Entry]:
        self._table.refresh()
        seen: set[str] = set()
        for rows in self._table.batches(self._columns(), of_maker(maker)):
            for row in rows:
                if row["key"] not in seen:  # two writers may have stored a passage at the same time
                    seen.add(row["key"])
                    yield self._entry(row)

    def search(
        self, vector: Sequence[float], k: int = 5, maker: Maker | None = None, *, metric: str = "l2"
    ) -> list[Hit]:
        """Return the entries with the nearest retrieval vectors.

        Args:
            vector: the question's vector.
            k: number of entries.
            maker: only its entries; needed if texts are stored for several makers.
            metric: ``"l2"``, ``"cosine"`` or ``"dot"``.

        Raises:
            ValueError: if the store has no vectors, vectors of another size, or is encrypted.
        """
        if self.encrypted:
            raise ValueError(
                f"The store {self.uri} is encrypted and cannot be searched by vector: an index shows its vectors, which give "
                "texts away. Search in an index of your own, and read the passages found by their keys."
            )
        size = self._table.vector_size or (self._table.refresh() and self._table.vector_size)
        if size != len(vector):
            held = f"vectors of {size} dimensions" if size else "no retrieval vectors"
            raise ValueError(f"The store {self.uri} holds {held}; the one searched for has {len(vector)}.")
        rows = self._table.nearest(vector, k, self._columns(), of_maker(maker), metric)
        return [Hit(self._entry(row), float(row["_distance"])) for row in rows]

    def _columns(self) -> list[str]:
        names = [field.name for field in FIELDS if self._slabs is None or field.name != "data"]
        return names + ([VECTOR] if self._table.vector_size else [])

    def _entry(self, row: Mapping[str, Any]) -> Entry:
        key = key_of(row)
        facts = facts_of(row, row.get(VECTOR), self._cipher)
        passage = self._passage(key, Place.of(row, self._cipher), row.get("data"))
        return Entry(key, passage, facts.text, facts.vector, facts.about)

    @property
    def stats(self) -> StoreStats:
        """Totals, counted now; ``info`` has layout, encoding, versions, vector size and bytes of the slabs."""
        self._table.refresh()
        makers = self._table.count_makers()
        info = {"layout": self.layout, "encoding": str(self.encoding), "versions": self._table.versions}
        info |= {"encrypted": True} if self.encrypted else {}
        info |= {"vector_size": self._table.vector_size}
        if self._slabs is not None:
            info["slab_bytes"] = sum(self._slabs.sizes().values())
        return StoreStats(sum(made.passages for made in makers), sum(made.nbytes for made in makers), makers, info)

    def close(self) -> None:
        if self._slabs is not None:
            self._slabs.close()
