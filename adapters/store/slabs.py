"""Slabs: append-only files of raw bytes, read through memory maps.

Every writer appends to its own locked slabs; bytes are on disk before `append` returns. The store's table records the place
of each passage. Bytes without a row are left over from killed writers; compaction removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import StoreError
from .codec import ALIGNMENT

MAGIC = b"nutgraf slab 1\n".ljust(ALIGNMENT, b"\0")
MAX_BYTES = 2**30  # a larger slab is closed and a new one begun


@dataclass
class _Open:
    """Descriptor (valid even if the file is deleted) and memory map of a slab."""

    handle: int
    map: mmap.mmap


class Slabs:
    """The slabs in a folder, which is made at the first write. Safe to share between threads and processes, including forks."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._open: dict[str, _Open] = {}
        self._writer: tuple[str, int, int] | None = None  # name, descriptor, process

    def append(self, records: Sequence[bytes]) -> list[tuple[str, int]]:
        """Write records to disk and return the slab and offset of each.

        Raises:
            StoreError: if the disk is full or cannot be written; then nothing is kept.
        """
        with self._lock:
            try:
                name, handle = self._writable()
                start = os.lseek(handle, 0, os.SEEK_END)
                places, run = [], bytearray()
                for record in records:
                    run.extend(bytes(-(start + len(run)) % ALIGNMENT))
                    places.append((name, start + len(run)))
                    run.extend(record)
                try:
                    _write_all(handle, run)
                    os.fsync(handle)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, start)
                    raise
            except OSError as error:
                raise StoreError(_cannot_write(self.folder, error)) from error
            return places

    def roll(self) -> None:
        """Close the current slab; the next record begins a new one."""
        with self._lock:
            writer, self._writer = self._writer, None
            if writer is not None:
                os.close(writer[1])

    def _writable(self) -> tuple[str, int]:
        if self._writer is not None:
            name, handle, process = self._writer
            if process == os.getpid() and os.fstat(handle).st_size < self.max_bytes:
                return name, handle
            self.roll()  # full, or the parent process still writes to it
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            name = f"{secrets.token_hex(8)}.slab"
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_nlink:  # else a compaction removed it before it was locked
                    _write_all(handle, MAGIC)
                    _sync_folder(self.folder)
                    self._writer = (name, handle, os.getpid())
                    return name, handle
            except BlockingIOError:
                pass  # a compaction is checking it right now
            except OSError:
                os.close(handle)
                (self.folder / name).unlink(missing_ok=True)
                raise
            os.close(handle)

    def read(self, name: str, start: int, length: int) -> memoryview:
        """Return a record as a view of the privately mapped file; writing into it changes no file.

        Raises:
            StoreError: if the slab is missing (`FileNotFoundError` is its cause) or too short.
        """
        with self._lock:
            found = self._open.get(name) or self._map(name)
            # Checked at every read: touching a map beyond the end of a truncated file kills the process.
            size = os.fstat(found.handle).st_size
            if start + length > size:
                raise StoreError(
                    f"The slab {self.folder / name} is cut off: {size} bytes, but a passage stands at {start} to "
                    f"{start + length}. Run `nutgraf store verify DIR --drop`, then compress the lost passages again."
                )
            if start + length > len(found.map):
                found = self._map(name)  # it has grown since
            return memoryview(found.map)[start : start + length]

    def _map(self, name: str) -> _Open:
        path = self.folder / name
        try:
            before = self._open.get(name)
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if before is None else before.handle
            try:
                mapped = mmap.mmap(handle, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                if mapped[: len(MAGIC)] != MAGIC:
                    raise ValueError("it does not begin as one")
            except (OSError, ValueError):
                if before is None:
                    os.close(handle)
                raise
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read as a slab of compressed passages: {error}. Run `nutgraf store verify DIR`."
            ) from error
        self._open[name] = _Open(handle, mapped)  # views keep an earlier map alive
        return self._open[name]

    def sizes(self) -> dict[str, int]:
        """Size of each slab in bytes."""
        if not self.folder.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.slab"))}

    @contextlib.contextmanager
    def idle(self) -> Iterator[set[str]]:
        """Lock the slabs that no writer holds and give their names."""
        self.roll()
        handles: dict[str, int] = {}
        try:
            for name in self.sizes():
                handle = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    handles[name] = handle
                except OSError:
                    os.close(handle)  # in use by a writer
            yield set(handles)
        finally:
            for handle in handles.values():
                os.close(handle)

    def remove(self, name: str) -> None:
        """Delete a slab; open readers are not affected."""
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files; views already returned stay readable."""
        with self._lock:
            self.roll()
            for found in self._open.values():
                os.close(found.handle)
            self._open.clear()


def _write_all(handle: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(folder: Path, error: OSError) -> str:
    why = error.strerror or error
    return (
        f"{folder} cannot be written: {why}. Nothing was stored; free space or fix its permissions, and run it again."
    )
