"""nutgraf: the nut graf of each retrieved passage, read by an LLM instead of the passage.

Compressors turn passages into compressed passages (soft embeddings, a short KV cache or a shorter text); a `Reader` reads
them in prompts that mix text and compressed passages; adapters plug both into RAG frameworks; recipes train compressors;
benchmarks measure what was gained and lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressors import CompressedPassage, Compressor, Reader, load_compressor, make_compressor, pretrained

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
