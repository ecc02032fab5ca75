"""Loads a compressor from a folder, the hub or a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Compressor
from .core.checkpoint import CONFIG_NAME, READER_FOLDER, download, read_config
from .core.errors import CheckpointError
from .core.shipped import locate, shipped_names
from .importers import import_recognised, published_class
from .reader.reader import Reader
from .registry import COMPRESSORS, compressor_class, make_compressor


def load_compressor(name_or_path: str | Path, reader: Reader | None = None, **kwargs: Any) -> Compressor:
    """Loads a trained compressor, or makes one that needs no training.

    Args:
        name_or_path: the name of a method that needs no training (``"kv-match"``), also with settings
            (``"kv-match:budget=uniform,probes=8"``); a shipped compressor (``"icae-smollm2"``) or a folder that
            `save_pretrained` or ``nutgraf import`` wrote, both also with settings; a hub id ``owner/name``; or a file, folder
            or hub id in a published layout that `nutgraf.compressors.importers` knows.
        reader: the reader it was trained for, or that a method without training compresses for; default: the one in the
            folder, if any.
        kwargs: passed to the compressor's constructor or the importer; the settings of a training-free method.

    Raises:
        ValueError: if nothing has this name, a setting is not written ``key=value``, or a reader must be given.
        CheckpointError: if the checkpoint is missing, damaged or incomplete, or a reader must be given.
        ReaderMismatchError: if it was made for another reader.
    """
    name = str(name_or_path)
    method = name.partition(":")[0]
    known = COMPRESSORS.get(method)
    if known is not None and known.training_free and not Path(name).exists():
        if reader is None:
            raise ValueError(f"{name} needs a reader: load_compressor({name!r}, reader=reader).")
        return make_compressor(method, reader, **_settings(name), **kwargs)
    if ":" in name and not Path(name).exists() and (method in shipped_names() or Path(method).is_dir()):
        name, kwargs = method, {**_settings(name), **kwargs}
    path = Path(locate(name))
    if not path.exists():
        if "/" not in name:
            raise ValueError(_unknown(name))
        path = download(name)
    about: dict[str, Any] = {}
    try:
        about = read_config(path)
    except CheckpointError:
        if not Path(locate(name)).exists():
            path = download(name, pickles=True)
        imported = import_recognised(path, reader, **kwargs)
        if imported is not None:
            return imported
        raise
    cls = published_class(about["method"], about["config"]) or compressor_class(about["method"])
    return cls.from_pretrained(path, reader or _own_reader(path, about), **kwargs)


def _settings(name: str) -> dict[str, Any]:
    """The settings in ``METHOD:key=value,key=value``."""
    _, colon, written = name.partition(":")
    found: dict[str, Any] = {}
    for part in written.split(",") if colon else ():
        key, _, value = part.partition("=")
        if not (key and value):
            raise ValueError(f"{name!r}: {part!r} is no setting; write METHOD:key=value,key=value.")
        found[key] = int(value) if value.isdigit() else {"true": True, "false": False}.get(value.lower(), value)
    return found


def _unknown(name: str) -> str:
    free = ", ".join(sorted(method for method, cls in COMPRESSORS.items() if cls.training_free))
    shipped = ", ".join(each for each in shipped_names() if not each.startswith("reader-"))
    trained = f"{name} needs training: nutgraf train. " if name in COMPRESSORS else ""
    return (
        f"There is no compressor {name!r}. {trained}Methods without training: {free}; shipped: {shipped}; a folder or a hub id "
        "OWNER/NAME is taken too."
    )


def _own_reader(folder: Path, about: dict[str, Any]) -> Reader:
    """Loads the reader that an imported compressor was saved with."""
    if not (folder / READER_FOLDER / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no reader of its own; pass the one it was made for, {about.get('reader_name')!r}: "
            "load_compressor(..., reader=Reader.from_pretrained(...))."
        )
    return Reader.from_pretrained(folder / READER_FOLDER)
