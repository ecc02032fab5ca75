"""Models that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .compressors.reader.packaged import SMOLLM2

if TYPE_CHECKING:
    from .compressors import Compressor, Reader

PRETRAINED = Path(__file__).parent / "recipes" / "pretrained"


def pretrained(name: str) -> str:
    """Return the folder of a shipped model, such as ``"reader-small"``, ``"xrag-small"`` or ``"icae-small"``.

    Raises:
        ValueError: if no shipped model has this name.
    """
    if name not in (have := sorted(p.name for p in PRETRAINED.glob("*/") if (p / "config.json").exists())):
        raise ValueError(f"No shipped artefact is called {name!r}; the package holds {have}.")
    return str(PRETRAINED / name)


def locate(name: str) -> str:
    """Return the folder of a shipped model, or ``name`` itself: a folder, a hub id, `SMOLLM2` or a training-free method.

    Raises:
        ValueError: if it is none of these.
    """
    if "/" in name or name == SMOLLM2 or Path(name).exists():
        return name
    try:
        return pretrained(name)
    except ValueError:
        from .compressors import COMPRESSORS  # torch takes seconds to import, and shipped names do not need it

        if name in COMPRESSORS and COMPRESSORS[name].training_free:
            return name
        raise


def find_compressor(name: str, reader: Reader) -> Compressor:
    """A shipped compressor by name, one from a folder or the hub, or a method that needs no training.

    Raises ValueError for settings that are not `key=value`.
    """
    from .compressors import COMPRESSORS, load_compressor, make_compressor

    method, colon, written = name.partition(":")
    cls = COMPRESSORS.get(method)
    if cls is not None and cls.training_free:
        pairs = [part.partition("=") for part in written.split(",")] if colon else []
        if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
            raise ValueError(f"{name!r}: {bad[0]!r} is no setting; write {method}:key=value,key=value.")
        settings = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
        return load_compressor(method, reader, **settings)
    if cls is not None and cls.interface == "text":
        return make_compressor(name, reader)
    return load_compressor(locate(name), reader)
