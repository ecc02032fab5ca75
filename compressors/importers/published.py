"""Settings and behaviour that exist only to reproduce published releases.

The classes here and in the importers extend a method with what its authors' code does differently. They keep the method's name,
and `load_compressor` picks them when a folder holds such settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base import Passages
from ..core.config import setting
from ..slots.segments import SegmentCompressor


@dataclass(kw_only=True)
class PublishedSettings:
    """Config mixin with settings that several releases need."""

    fixed_slots: bool = setting(False, "every segment gets all its slots, even if it has fewer tokens")
    bos: bool = setting(True, "put BOS before every segment")
    as_prompt: bool = setting(
        False,
        "tokenise a passage as the start of a prompt, where SentencePiece tokenizers add a space; default: as it "
        "stands inside a prompt",
    )


class PublishedCompressor(SegmentCompressor):
    """Mixin that applies `PublishedSettings`. Put it before the method in the list of bases."""

    config: Any

    @property
    def opening(self) -> list[int]:
        """BOS, unless the release leaves it out."""
        return super().opening if self.config.bos else []

    def token_ids(self, passages: Passages) -> list[list[int]]:
        """Token ids, tokenised as the release does."""
        if not self.config.as_prompt or not passages.texts:
            return super().token_ids(passages)
        return self.tokenizer.encode_batch([(text, True) for text in passages.texts])

    def slots_of(self, n_tokens: int, ratio: float | None) -> int:
        """All slots with ``fixed_slots``."""
        return self.most_slots if self.config.fixed_slots else super().slots_of(n_tokens, ratio)
