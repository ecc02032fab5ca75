"""Loads a compressor from a folder, the hub or a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Compressor
from .core.checkpoint import CONFIG_NAME, READER_FOLDER, download, read_config
from .core.errors import CheckpointError
from .importers import import_recognised, published_class
from .reader.reader import Reader
from .registry import COMPRESSORS, compressor_class, make_compressor


def load_compressor(name_or_path: str | Path, reader: Reader | None = None, **kwargs: Any) -> Compressor:
    """Loads a trained compressor from a folder or the Hugging Face hub, or makes a training-free one.

    Args:
        name_or_path: a folder that `save_pretrained` or ``nutgraf import`` wrote, a hub id ``owner/name``, a file, folder or
            hub id in a published layout that `nutgraf.compressors.importers` knows, or the name of a method that needs
            no training, such as ``"kv-match"``.
        reader: the reader it was trained for; default: the one in the folder, if any.
        kwargs: passed to the compressor's constructor or the importer; the settings of a training-free method.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or incomplete, or a reader must be given.
        ReaderMismatchError: if it was made for another reader.
    """
    path = Path(name_or_path)
    known = COMPRESSORS.get(str(name_or_path))
    if known is not None and known.training_free and not path.exists():
        if reader is None:
            raise ValueError(f"{name_or_path} needs a reader: load_compressor({str(name_or_path)!r}, reader=reader).")
        return make_compressor(str(name_or_path), reader, **kwargs)
    if not path.exists():
        path = download(str(name_or_path))
    about: dict[str, Any] = {}
    try:
        about = read_config(path)
    except CheckpointError:
        if not Path(name_or_path).exists():
            path = download(str(name_or_path), pickles=True)
        imported = import_recognised(path, reader, **kwargs)
        if imported is not None:
            return imported
        raise
    cls = published_class(about["method"], about["config"]) or compressor_class(about["method"])
    return cls.from_pretrained(path, reader or _own_reader(path, about), **kwargs)


def _own_reader(folder: Path, about: dict[str, Any]) -> Reader:
    """Loads the reader that an imported compressor was saved with."""
    if not (folder / READER_FOLDER / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no reader of its own; pass the one it was made for, {about.get('reader_name')!r}: "
            "load_compressor(..., reader=Reader.from_pretrained(...))."
        )
    return Reader.from_pretrained(folder / READER_FOLDER)
