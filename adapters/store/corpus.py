"""Compress a corpus of files into a store, in one process or in many with Ray Data."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...compressors import Compressor, FidelityGate, Reader, load_compressor
from ...compressors.core.textfiles import LINES, TEXTS, kind_of, read_json_lines, read_lines
from . import Filled, LanceStore, PassageStore, fill, keys_for
from .base import Facts, batched
from .fill import BATCH

_AHEAD = 8  # batches of passages looked up in the store at a time


@dataclass(frozen=True)
class Passage:
    """A passage of a corpus, its file, and its line or number there."""

    text: str
    about: Mapping[str, Any]


def read_corpus(path: str | Path, field: str = "text") -> Iterator[Passage]:
    """Yield the passages of a file, or of all files in a folder in sorted order. Files may be compressed (``.xz``, ``.gz``).

    A JSON line (``.jsonl``, ``.ndjson``) has a passage in ``field``, or a list ``passages`` of strings or objects with that
    field. Text files (``.txt``, ``.md``) have blank lines between passages.

    Warns:
        UserWarning: if a folder holds files of other kinds, which are left out. Hidden files and folders, such as ``.git``, are
            left out in silence.

    Raises:
        FileNotFoundError: if there is no such file, or no file in the folder.
        ValueError: if a file is of another kind, is not UTF-8, or a line has no text; file and line are named.
    """
    path = Path(path)
    for file in _files(path):
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        yield from _read_lines(file, name, field) if kind_of(file) in LINES else _read_texts(file, name)


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(LINES + TEXTS)
    if not path.is_dir():
        if path.is_file() and kind_of(path) not in LINES + TEXTS:
            raise ValueError(f"A corpus is a {kinds} file (packed or not) or a folder, got {path.name}.")
        return [path]
    every = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    found = [file for file in every if kind_of(file) in LINES + TEXTS]
    if not found:
        raise FileNotFoundError(f"The folder {path} holds no {kinds} files, packed or not.")
    if others := [str(file.relative_to(path)) for file in every if kind_of(file) not in LINES + TEXTS]:
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        warnings.warn(f"{len(others)} files in {path} are left out, as they are not {kinds}: {names}.", stacklevel=3)
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_lines(file: Path, name: str, field: str) -> Iterator[Passage]:
    for number, where, row in read_json_lines(file):
        for item in _items(row, field):
            text = item.get(field) if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise ValueError(
                    f"{where} has no text: it needs a string {field!r} or a list 'passages'. Name the field with --field."
                )
            about = {k: v for k, v in item.items() if k != field} if isinstance(item, dict) else {}
            yield Passage(text, {"file": name, "line": number} | about)


def _items(row: Any, field: str) -> list[Any]:
    several = row.get("passages") if isinstance(row, dict) and field not in row else None
    return several if isinstance(several, list) else [row]


def _read_texts(file: Path, name: str) -> Iterator[Passage]:
    number = 0
    part: list[str] = []
    for line in read_lines(file):
        if line.strip():
            part.append(line)
        elif part:
            yield Passage("".join(part).strip(), {"file": name, "passage": number})
            number, part = number + 1, []
    if part:
        yield Passage("".join(part).strip(), {"file": name, "passage": number})


def compress_corpus(
    passages: Iterator[Passage],
    store: PassageStore,
    compressor: Compressor,
    *,
    ratio: float | None = None,
    gate: FidelityGate | None = None,
    batch_size: int = BATCH,
    done: Callable[[int], None] | None = None,
) -> Filled:
    """Compress a corpus into a store in this process, in order. After a stop, run it again to continue.

    Args as for `fill`; ``passages`` come from `read_corpus` and are read a few batches at a time.
    """
    total = Filled()
    for some in batched(passages, batch_size * _AHEAD):
        texts, abouts = [p.text for p in some], [p.about for p in some]
        total += fill(store, compressor, texts, ratio=ratio, abouts=abouts, gate=gate, batch_size=batch_size, done=done)
    return total


def compress_corpus_with_ray(
    passages: Iterator[Passage],
    store: LanceStore,
    compressor: str,
    reader: str,
    *,
    ratio: float | None = None,
    batch_size: int = BATCH,
    workers: int = 2,
    gpus: float = 0.0,
    reader_options: Mapping[str, Any] | None = None,
    done: Callable[[int], None] | None = None,
) -> Filled:
    """Compress a corpus with Ray Data: each of ``workers`` actors holds a compressor and writes into the store.

    Stored passages are not sent. A worker that dies is restarted with its batch; nothing is stored twice. On a cluster
    (``ray.init(address=...)`` before, or ``RAY_ADDRESS``), store, compressor and reader must be reachable from every machine:
    shared folders, or a URI and hub ids.

    Args:
        compressor, reader: folders or hub ids, loaded by each worker.
        workers: number of actors.
        gpus: GPUs per actor.
        reader_options: further arguments of ``Reader.from_pretrained``.

    Raises:
        ImportError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("The engine ray needs Ray Data: pip install nutgraf[ray].") from error

    compressor, reader = (  # a worker may run in another folder
        os.path.abspath(name) if os.path.isdir(name) else name for name in (compressor, reader)
    )
    local = load_compressor(compressor, Reader.from_pretrained(reader, **(reader_options or {})))
    total = Filled()
    tell = done or (lambda number: None)
    settings = (store, compressor, reader, ratio, dict(reader_options or {}))
    for some in batched(passages, batch_size * workers * _AHEAD):
        keys = keys_for(local, [p.text for p in some], ratio=ratio)
        by_key = dict(zip(keys, some))
        missing = set(store.missing(keys))
        stored = {key: Facts(p.text, about=p.about) for key, p in by_key.items() if key not in missing}
        rows = [{"text": by_key[key].text, "about": json.dumps(dict(by_key[key].about))} for key in missing]
        tell(len(some) - len(rows))
        total += Filled(found=len(stored), updated=store.describe(stored))
        if not rows:
            continue
        made = ray.data.from_items(rows).map_batches(
            RayWorker,
            fn_constructor_args=settings,
            batch_size=batch_size,
            num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        for row in made.iter_rows():
            total += Filled(*(int(row[name]) for name in ("found", "compressed", "source_tokens", "slots", "updated")))
            tell(int(row["texts"]))
    return total


class RayWorker:
    """Ray actor that compresses batches into the store."""

    def __init__(
        self,
        store: LanceStore,
        compressor: str,
        reader: str,
        ratio: float | None,
        reader_options: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.ratio = ratio
        self.compressor = load_compressor(compressor, Reader.from_pretrained(reader, **reader_options))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Compress a batch with the columns ``text`` and ``about`` (JSON); return the counts."""
        texts = [str(text) for text in batch["text"]]
        abouts = [json.loads(about) for about in batch["about"]]
        filled = fill(self.store, self.compressor, texts, ratio=self.ratio, abouts=abouts, batch_size=len(texts))
        return {"texts": [len(texts)]} | {name: [count] for name, count in asdict(filled).items()}
