"""nutgraf: the nut graf of each retrieved passage, read by an LLM instead of the passage.

Compressors turn passages into compressed passages (soft embeddings, a short KV cache or a shorter text); a `Reader` reads
them in prompts that mix text and compressed passages; adapters drop both into RAG frameworks; recipes train them and
benchmarks measure what was won and what was lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressors import CompressedPassage, Compressor, Reader, load_compressor, make_compressor

__version__ = "0.1.0"
__all__ = [
    "CompressedPassage",
    "Compressor",
    "Reader",
    "__version__",
    "load_compressor",
    "make_compressor",
    "pretrained",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `nutgraf --help` does not need it.
    if name in __all__:
        from . import compressors

        return getattr(compressors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


SMOLLM2 = "SmolLM2-135M-Instruct"  # a reader that the package index holds; see compressors/packaged_lm.py
_PRETRAINED = Path(__file__).parent / "recipes" / "pretrained"


def pretrained(name: str) -> str:
    """Local folder of an artefact that ships with the package.

    Args:
        name: for instance ``"reader-small"``, ``"xrag-small"`` or ``"icae-small"``.

    Raises:
        ValueError: if nothing of that name ships with the package.
    """
    folder = _PRETRAINED / name
    if name not in (have := sorted(p.name for p in _PRETRAINED.glob("*/") if (p / "config.json").exists())):
        raise ValueError(f"No shipped artefact is called {name!r}; the package holds {have}.")
    return str(folder)


def locate(name: str) -> str:
    """The folder of a shipped artefact, or `name` itself: a folder, a hub id or `SMOLLM2`.

    Raises:
        ValueError: if it is none of these.
    """
    return name if "/" in name or name == SMOLLM2 or Path(name).exists() else pretrained(name)
