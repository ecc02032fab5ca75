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
    """Return the folder of a shipped model, or ``name`` itself if it is a folder, a hub id or `SMOLLM2`.

    Raises:
        ValueError: if it is none of these.
    """
    return name if "/" in name or name == SMOLLM2 or Path(name).exists() else pretrained(name)
