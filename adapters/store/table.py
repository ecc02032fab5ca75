"""The LanceDB table of a store, one row per passage. Errors of lancedb become `StoreError`s that say what to do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from .base import Maker, MakerStats, StoreError, batched

try:
    import lancedb
    import pyarrow as pa
    import pyarrow.compute as pc
    from lancedb.index import BTree
except ImportError as error:  # pragma: no cover
    raise ImportError("LanceStore needs lancedb: pip install nutgraf[store].") from error

T = TypeVar("T")
NAME = "passages"
FORMAT = 1
VECTOR = "vector"
_SETTINGS = b"nutgraf"  # metadata entry of the schema with the store's settings
_LOOKED_UP = 1000  # keys per query
_ATTEMPTS = 8  # of a commit that conflicts with other writers

FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("text_hash", pa.string(), nullable=False),
    pa.field("compressor", pa.string(), nullable=False),
    pa.field("reader", pa.string()),
    pa.field("ratio", pa.float64()),
    pa.field("query_hash", pa.string()),
    pa.field("interface", pa.string(), nullable=False),
    pa.field("source_tokens", pa.int64(), nullable=False),
    pa.field("slots", pa.int64(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("about", pa.string()),
    pa.field("header", pa.string(), nullable=False),
    pa.field("slab", pa.string()),
    pa.field("start", pa.int64()),
    pa.field("nbytes", pa.int64(), nullable=False),
    pa.field("crc", pa.int64(), nullable=False),
    pa.field("data", pa.large_binary()),
]


class PassageTable:
    """An opened or new table.

    ``settings`` are for a new table; an existing one keeps its own, in the attribute of this name.

    Raises:
        StoreError: if there is no table, it cannot be read, or a newer version wrote it.
    """

    def __init__(
        self, uri: str, settings: Mapping[str, Any], *, create: bool, options: Mapping[str, str] | None = None
    ) -> None:
        self.uri = uri
        local = "://" not in uri
        if local and not create and not (Path(uri) / f"{NAME}.lance").is_dir():
            raise StoreError(
                f"{uri} holds no store of compressed passages; `nutgraf compress ... --store {uri}` makes one."
            )
        with self._errors("opened"):
            self._db = lancedb.connect(uri, storage_options=None if options is None else dict(options))
            self._table = self._open(settings, create)
        self.settings = self._read_settings()

    def _open(self, settings: Mapping[str, Any], create: bool) -> Any:
        schema = pa.schema(FIELDS, metadata={_SETTINGS: json.dumps({"format": FORMAT, **settings})})
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(ValueError):  # there is none
                return self._db.open_table(NAME)
            if not create:
                break
            try:
                return self._db.create_table(NAME, schema=schema)
            except (ValueError, RuntimeError, OSError):
                if not _exists(self._db):
                    raise
                # another process was faster
        raise StoreError(f"{self.uri} holds no store of compressed passages.")

    def _read_settings(self) -> dict[str, Any]:
        raw = (self._table.schema.metadata or {}).get(_SETTINGS)
        found = json.loads(raw) if raw else {}
        if found.get("format") != FORMAT:
            raise StoreError(
                f"{self.uri} is of format {found.get('format')!r}, and this version reads format {FORMAT}; "
                "install the version that wrote it, or make a new store."
            )
        return dict(found)

    @property
    def vector_size(self) -> int | None:
        """Dimensions of the retrieval vectors; ``None``: there are none."""
        schema = self._table.schema
        return schema.field(VECTOR).type.list_size if VECTOR in schema.names else None

    def look_up(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows under the keys, as of the last `refresh`."""
        for some in batched(keys, _LOOKED_UP):
            listed = ", ".join(map(quoted, some))
            scan = functools.partial(self._scan, columns, f"key IN ({listed})")
            found = self._read(lambda scan=scan: scan().to_arrow())  # type: ignore[misc]
            yield from found.to_pylist()

    def sample(self, columns: Sequence[str]) -> dict[str, Any] | None:
        """One of the rows, or ``None``."""
        found = self._read(lambda: self._scan(columns, None).limit(1).to_arrow()).to_pylist()
        return found[0] if found else None

    def column_table(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Read columns of all rows; ``_rowid`` may be one of them."""
        return self._read(lambda: self._scan(columns, where).to_arrow())

    def first_keys(self, after: str, limit: int) -> list[str]:
        """Return up to ``limit`` distinct keys that follow ``after``, sorted."""
        keys = pc.unique(self.column_table(["key"], f"key > {quoted(after)}")["key"])
        first = pc.select_k_unstable(keys, limit, sort_keys=[("key", "ascending")])
        return list(keys.take(first).to_pylist())

    def batches(
        self, columns: Sequence[str], where: str | None = None, size: int = 256
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield all rows, ``size`` at a time, as of the first batch."""
        with self._errors("read"):
            self._table.checkout_latest()
            for batch in self._scan(columns, where).to_batches(size):
                yield batch.to_pylist()

    def nearest(self, vector: Sequence[float], k: int, columns: Sequence[str], where: str | None, metric: str) -> Any:
        """Return the rows with the nearest retrieval vectors and their ``_distance``, nearest first."""
        self.refresh()
        with self._errors("searched"):
            query = self._table.search(list(vector), vector_column_name=VECTOR).distance_type(metric)
            query = query.where(where, prefilter=True) if where else query
            return query.limit(k).select([*columns, "_distance"]).to_arrow().to_pylist()

    def count_makers(self) -> tuple[MakerStats, ...]:
        """Totals per maker, the largest first."""
        by = ["compressor", "reader", "ratio", "interface"]
        rows = self.column_table(["key", *by, "slots", "source_tokens", "nbytes"])
        if pc.count_distinct(rows["key"]).as_py() < len(rows):  # two writers stored a passage at the same moment
            numbered = rows.append_column("row", pa.array(range(len(rows))))
            rows = rows.take(numbered.group_by("key").aggregate([("row", "min")])["row_min"])
        sums = rows.group_by(by).aggregate(
            [("key", "count"), *((n, "sum") for n in ("slots", "source_tokens", "nbytes"))]
        )
        made = (
            MakerStats(
                Maker(row["compressor"], row["reader"], row["ratio"]),
                row["interface"],
                row["key_count"],
                row["slots_sum"],
                row["source_tokens_sum"],
                row["nbytes_sum"],
            )
            for row in sums.to_pylist()
        )
        return tuple(sorted(made, key=lambda one: -one.passages))

    def refresh(self) -> bool:
        """Load what other processes have written; return whether there was anything new."""
        with self._errors("read"):
            before = self._table.version
            self._table.checkout_latest()
            return bool(self._table.version != before)

    def _scan(self, columns: Sequence[str], where: str | None) -> Any:
        query = self._table.search().select([column for column in columns if column != "_rowid"]).limit(None)
        query = query.where(where) if where else query
        return query.with_row_id(True) if "_rowid" in columns else query

    def _read(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (RuntimeError, OSError, ValueError):
            self.refresh()  # the version that was held may have been cleaned up
        with self._errors("read"):
            return read()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows in one commit."""
        fields = [field for field in self._table.schema if field.name in rows[0]]
        data = pa.Table.from_pylist(list(rows), schema=pa.schema(fields))
        self._write(lambda: self._table.add(data))

    def replace(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Overwrite columns of rows, matched by ``key``, in one commit."""
        fields = [field for field in self._table.schema if field.name in ("key", *columns)]
        data = pa.Table.from_pylist(list(rows), schema=pa.schema(fields))
        # "null", because lancedb takes a missing vector for a bad one; entries are checked for NaN before
        found = self._table.merge_insert("key").when_matched_update_all()
        self._write(lambda: found.execute(data, on_bad_vectors="null"))

    def delete(self, where: str) -> None:
        """Delete rows in one commit."""
        self._write(lambda: self._table.delete(where))

    def hold_vectors(self, size: int) -> None:
        """Add the column of retrieval vectors.

        Raises:
            ValueError: if the table holds vectors of another size.
        """
        have = self.vector_size
        if have is None:
            with contextlib.suppress(StoreError):  # another writer may have been faster
                self._write(lambda: self._table.add_columns(pa.field(VECTOR, pa.list_(pa.float32(), size))))
            self.refresh()
            have = self.vector_size
        if have is None:
            raise StoreError(f"{self.uri} could not be given a column of retrieval vectors; try again.")
        if have != size:
            raise ValueError(
                f"The store {self.uri} holds retrieval vectors of {have} dimensions, got one of {size}; "
                "embed with the model that the store was made with, or make another store."
            )

    def optimize(self, keep: timedelta) -> None:
        """Join small files, update the index of keys, and delete versions older than ``keep``."""
        with self._errors("compacted"):
            if self._table.count_rows() and not self._table.list_indices():
                self._table.create_index("key", config=BTree())
            self._table.optimize(cleanup_older_than=keep)
        self.refresh()

    def _write(self, write: Callable[[], Any]) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                with self._errors("written"):
                    write()
                return
            except StoreError as error:
                if "conflict" not in str(error).lower() or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.01, 0.05) * 2**attempt)  # two writers must not retry in step
                self.refresh()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            advice = _advice(what, remote="://" in self.uri)
            raise StoreError(f"The store {self.uri} cannot be {what}: {_short(error)}.{advice}") from error

    @property
    def versions(self) -> int:
        """Number of versions of the table."""
        with self._errors("read"):
            return len(self._table.list_versions())


def quoted(text: str) -> str:
    """Quote a string for a SQL filter."""
    return "'" + text.replace("'", "''") + "'"


def of_maker(maker: Maker | None) -> str | None:
    """SQL filter for one maker's rows."""
    if maker is None:
        return None
    reader = "reader IS NULL" if maker.reader is None else f"reader = {quoted(maker.reader)}"
    ratio = "ratio IS NULL" if maker.ratio is None else f"ratio = {maker.ratio!r}"
    return f"compressor = {quoted(maker.compressor)} AND {reader} AND {ratio}"


def _exists(db: Any) -> bool:
    try:
        db.open_table(NAME)
    except (ValueError, RuntimeError, OSError):
        return False
    return True


def _short(error: BaseException) -> str:
    """The error without places in Lance's source; for object storage, code and message of its answer."""
    text = str(error).split(", /rustc/")[0].split(", /root/")[0].strip().rstrip(".")
    said = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]+)</{tag}>", text))]
    text = ": ".join(said).rstrip(".") or text
    return text if len(text) < 500 else text[:500] + "..."


def _advice(what: str, remote: bool) -> str:
    where = (
        " Is its bucket there, and are address, region and credentials right (storage_options, or AWS_ENDPOINT, "
        "AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment)?"
    )
    if what == "written":
        return " Passages not acknowledged were not stored; free space or fix permissions, and run it again."
    damaged = " A file of it may be missing or damaged: run `nutgraf store verify DIR`."
    return where + damaged if remote and what == "read" else where if remote else damaged


def writable(uri: str) -> bool:
    """Whether a local store's folder may be written; remote stores are assumed writable."""
    folder = Path(uri)
    return "://" in uri or not folder.exists() or os.access(folder, os.W_OK)
