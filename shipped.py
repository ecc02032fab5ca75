"""Models that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .compressors.reader.packaged import SMOLLM2

if TYPE_CHECKING:
    pass


PRETRAINED = Path(__file__).parent / "recipes" / "pretrained"


def pretrained(name: str) -> str:
    """Local folder of an artefact that ships with the package.

    Args:
        name: for instance ``"reader-small"``, ``"xrag-small"`` or ``"icae-small"``.

    Raises:
        ValueError: if nothing of that name ships with the package.
    """
    folder = PRETRAINED / name
    if name not in (have := sorted(p.name for p in PRETRAINED.glob("*/") if (p / "config.json").exists())):
        raise ValueError(f"No shipped artefact is called {name!r}; the package holds {have}.")
    return str(folder)


def locate(name: str) -> str:
    """The folder of a shipped artefact, or `name` itself: a folder, a hub id or `SMOLLM2`.

    Raises:
        ValueError: if it is none of these.
    """
    return name if "/" in name or name == SMOLLM2 or Path(name).exists() else pretrained(name)
