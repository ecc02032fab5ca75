"""Selective Context: drops the units of text that a language model predicts well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.config import CompressorConfig
from ..core.units import Span
from ..registry import register_compressor
from .budget import kept_share
from .published.selective_context import drop_predictable
from .selection import LMSelectingCompressor, LMSelectionConfig


@dataclass
class SelectiveContextConfig(LMSelectionConfig):
    """Settings of Selective Context."""

    method: ClassVar[str] = "selective-context"
    title: ClassVar[str] = "Selective Context"
    retired: ClassVar[dict[str, Any]] = {"context": "passage"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "published" and self.unit == "word":
            raise ValueError("mode='published' drops tokens, phrases or sentences; unit 'word' is not in the paper.")


@register_compressor
class SelectiveContextCompressor(LMSelectingCompressor):
    """Keeps the units with the highest mean self-information ``-log p(token | before)`` (arXiv 2310.06201).

    ``mode="fast"``: unlike the paper the budget is exact, tokens are predicted from the whole passage before them and not
    from their sentence alone, phrases need no parser, and white space is not collapsed.

    ``mode="published"``: the released filter, with a percentile instead of a budget. The result may exceed the ratio, numbers
    may be divided, and at token level sentences run together.

    No training. Questions are ignored.
    """

    config_class: ClassVar[type[CompressorConfig]] = SelectiveContextConfig
    config: SelectiveContextConfig

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The released filter on one passage."""
        if target_tokens is not None:
            raise TypeError("mode='published' has no options ['target_tokens']: it drops a share of the units.")
        return drop_predictable(self.scorer, text, round(1 - kept_share(ratio), 12), self.config.unit), ()
