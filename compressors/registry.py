"""The registry of methods, and the two ways to get a compressor: by method name or from a checkpoint."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .base import Compressor
from .checkpoint import CONFIG_NAME, CheckpointError, read_config

if TYPE_CHECKING:
    from .reader import Reader

READER_FOLDER = "reader"  # beside an imported compressor: the reader that came with it
COMPRESSORS: dict[str, type[Compressor]] = {}
T = TypeVar("T", bound=type[Compressor])


def register_compressor(cls: T) -> T:
    """Class decorator: makes a compressor known by its config's ``method`` name."""
    name = cls.config_class.method
    if name in COMPRESSORS and COMPRESSORS[name].__qualname__ != cls.__qualname__:
        raise ValueError(f"The method name {name!r} is already taken by {COMPRESSORS[name].__name__}.")
    COMPRESSORS[name] = cls
    return cls


def compressor_class(method: str) -> type[Compressor]:
    """The class of a method. Raises ``ValueError`` with the known names otherwise."""
    if method not in COMPRESSORS:
        raise ValueError(f"Unknown compression method {method!r}; known are {sorted(COMPRESSORS)}.")
    return COMPRESSORS[method]


def make_compressor(method: str, reader: Reader, **settings: Any) -> Compressor:
    """A new, untrained compressor of a method.

    Args:
        method: a registered name, such as ``"icae"``.
        reader: the reader that is to read what it makes.
        settings: those of the method's config class, and further arguments of its constructor (``embedder=`` of xRAG).

    Raises:
        ValueError: for an unknown method, or settings that neither of the two has.
    """
    cls = compressor_class(method)
    extra = set(inspect.signature(cls.__init__).parameters) - {"self", "config", "reader"}
    config = cls.config_class.from_dict({k: v for k, v in settings.items() if k not in extra})
    return cls(config, reader, **{k: v for k, v in settings.items() if k in extra})


def load_compressor(name_or_path: str | Path, reader: Reader | None = None, **kwargs: Any) -> Compressor:
    """Loads a trained compressor from a local folder or from the Hugging Face hub.

    Args:
        name_or_path: a folder that `save_pretrained` or ``nutgraf import`` wrote, a hub id ``owner/name``, or a file,
            folder or hub id in a published layout that `nutgraf.compressors.importers` knows.
        reader: the reader it was trained for; not needed where the folder holds its reader.
        kwargs: passed on to the compressor's constructor, or to the importer.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or incomplete, or a reader must be given.
        ReaderMismatchError: if it was made for another reader.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = download(str(name_or_path))
    about: dict[str, Any] = {}
    try:
        about = read_config(path)
    except CheckpointError:
        from .importers import import_recognised

        if not Path(name_or_path).exists():
            path = download(str(name_or_path), pickles=True)
        imported = import_recognised(path, reader, **kwargs)
        if imported is not None:
            return imported
        raise
    cls = compressor_class(about["method"])
    return cls.from_pretrained(path, reader or _own_reader(path, about), **kwargs)


def _own_reader(folder: Path, about: dict[str, Any]) -> Reader:
    """The reader that lies beside an imported compressor."""
    from .reader import Reader

    if not (folder / READER_FOLDER / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no reader of its own; pass the one it was made for, {about.get('reader_name')!r}: "
            "load_compressor(..., reader=Reader.from_pretrained(...))."
        )
    return Reader.from_pretrained(folder / READER_FOLDER)


def download(hub_id: str, pickles: bool = False) -> Path:
    """A hub repository's files in a local folder: configs, tokenizers and safetensors, or what torch pickled too.

    Raises:
        CheckpointError: if it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.bin", "*.pth", "*.pt"] if pickles else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a local folder nor a hub repository that can be reached: {error}"
        ) from error
