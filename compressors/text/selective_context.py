"""Selective Context: what a language model could have guessed is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..core.config import CompressorConfig
from ..core.passage import CompressedPassage
from ..core.units import split_units
from ..registry import register_compressor
from .lm_selection import LMSelectingCompressor, LMSelectionConfig
from .published.selective_context import drop_predictable
from .scoring import TokenScores, self_information
from .shares import kept_share


@dataclass
class SelectiveContextConfig(LMSelectionConfig):
    """Settings of Selective Context."""

    method: ClassVar[str] = "selective-context"

    context: Literal["passage", "sentence"] = field(
        default="passage",
        metadata={"help": "what a token is guessed from: the passage before it, or (the paper) its own sentence alone"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context not in ("passage", "sentence"):
            raise ValueError(f"context must be 'passage' or 'sentence', got {self.context!r}.")
        if self.mode == "faithful" and self.unit == "word":
            raise ValueError("mode='faithful' drops tokens, phrases or sentences; unit 'word' is not in the paper.")


@register_compressor
class SelectiveContextCompressor(LMSelectingCompressor):
    """Keeps the units with the highest mean self-information ``-log p(token | before)`` (arXiv 2310.06201).

    Nothing is trained. The scorer reads every token once. Beyond the paper: the budget is exact, a token is guessed from
    the whole passage before it (``context="sentence"`` is the paper's way), phrases need no parser, and white space is not
    collapsed. Questions are ignored.

    ``mode="faithful"``: the published filter (see `sentence_filter`), each sentence on its own and a percentile in place of
    a budget; the result may be longer than the ratio asks for, and at token level sentences run together.
    """

    config_class: ClassVar[type[CompressorConfig]] = SelectiveContextConfig
    config: SelectiveContextConfig

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """Self-information in nats of every token (of the scorer) of every text.

        Args:
            texts: the texts.
            queries: ignored.
        """
        if self.config.context == "passage":
            return self_information(self.scorer, texts, window=self.config.window)
        sentences = [split_units(text, "sentence") for text in texts]
        flat = [text[a:b] for text, spans in zip(texts, sentences) for a, b in spans]
        found = iter(self_information(self.scorer, flat, window=self.config.window))
        return [_join([(a, next(found)) for a, _ in spans]) for spans in sentences]

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        if self.config.mode == "fast":
            return super()._compress(texts, queries, ratio, vectors=vectors, **options)
        if options:
            raise TypeError(f"mode='faithful' has no options {sorted(options)}; it drops a share of the units.")
        asked = self.config.ratio if ratio is None else ratio
        info = {"method": self.config.method, "mode": "faithful", "unit": self.config.unit, "ratio_asked": float(asked)}
        out = []
        for text in texts:
            share = round(1 - kept_share(asked), 12)
            kept = drop_predictable(self.scorer, text, share, self.config.unit) if text else ""
            origin, n = self.fingerprint, self._count(text)
            out.append(CompressedPassage("text", n, origin, text=kept, n_tokens=self._count(kept), info=dict(info)))
        return out


def _join(parts: Sequence[tuple[int, TokenScores]]) -> TokenScores:
    """One text's scores out of its sentences', each with the character at which it starts."""
    ids = [i for _, part in parts for i in part.ids]
    offsets = [(start + a, start + b) for start, part in parts for a, b in part.offsets]
    return TokenScores(ids, offsets, torch.cat([part.nll for _, part in parts]) if parts else torch.zeros(0))
