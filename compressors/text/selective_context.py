"""Selective Context: drops the units of text that a language model predicts well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from ..core.config import CompressorConfig, check_choices
from ..core.units import Span, split_units
from ..registry import register_compressor
from .budget import kept_share
from .published.selective_context import drop_predictable
from .scoring import TokenScores, self_information
from .selection import LMSelectingCompressor, LMSelectionConfig


@dataclass
class SelectiveContextConfig(LMSelectionConfig):
    """Settings of Selective Context."""

    method: ClassVar[str] = "selective-context"

    context: Literal["passage", "sentence"] = field(
        default="passage",
        metadata={
            "help": "a token is predicted from the passage before it, or (the paper) from its own sentence alone"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"context": ("passage", "sentence")})
        if self.mode == "published" and self.unit == "word":
            raise ValueError("mode='published' drops tokens, phrases or sentences; unit 'word' is not in the paper.")


@register_compressor
class SelectiveContextCompressor(LMSelectingCompressor):
    """Keeps the units with the highest mean self-information ``-log p(token | before)`` (arXiv 2310.06201).

    ``mode="fast"``: unlike the paper the budget is exact, tokens are predicted from the whole passage before them
    (``context="sentence"`` is the paper's way), phrases need no parser, and white space is not collapsed.

    ``mode="published"``: the released filter, with a percentile instead of a budget. The result may exceed the ratio, and
    at token level sentences run together.

    No training. Questions are ignored.
    """

    config_class: ClassVar[type[CompressorConfig]] = SelectiveContextConfig
    config: SelectiveContextConfig

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """Self-information in nats of each token (of the scorer); ``queries`` are ignored."""
        if self.config.context == "passage":
            return self_information(self.scorer, texts, window=self.config.window)
        sentences = [split_units(text, "sentence") for text in texts]
        flat = [text[a:b] for text, spans in zip(texts, sentences) for a, b in spans]
        found = iter(self_information(self.scorer, flat, window=self.config.window))
        return [_join([(a, next(found)) for a, _ in spans]) for spans in sentences]

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The released filter on one passage."""
        if target_tokens is not None:
            raise TypeError("mode='published' has no options ['target_tokens']: it drops a share of the units.")
        return drop_predictable(self.scorer, text, round(1 - kept_share(ratio), 12), self.config.unit), ()


def _join(parts: Sequence[tuple[int, TokenScores]]) -> TokenScores:
    """Joins the scores of a text's sentences, each with the character at which it starts."""
    ids = [i for _, part in parts for i in part.ids]
    offsets = [(start + a, start + b) for start, part in parts for a, b in part.offsets]
    return TokenScores(ids, offsets, torch.cat([part.nll for _, part in parts]) if parts else torch.zeros(0))
