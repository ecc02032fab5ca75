"""Models that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

PRETRAINED = Path(__file__).parents[2] / "recipes" / "pretrained"


def shipped_names() -> list[str]:
    """Names of all shipped models, sorted."""
    return sorted(place.parent.name for place in PRETRAINED.glob("*/config.json"))


def pretrained(name: str) -> str:
    """The folder of a shipped model, such as ``"reader-smollm2"`` or ``"icae-smollm2"``.

    Raises:
        ValueError: if no shipped model has this name.
    """
    if name not in (have := shipped_names()):
        raise ValueError(f"No shipped model is called {name!r}; the package holds {', '.join(have)}.")
    return str(PRETRAINED / name)


def locate(name: str) -> str:
    """The folder of the shipped model `name`, or `name` itself if there is none, or a file or folder of that name exists."""
    return pretrained(name) if name in shipped_names() and not Path(name).exists() else name
