"""Models that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

from .compressors.reader.packaged import SMOLLM2

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
