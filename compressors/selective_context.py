"""Selective Context: what a language model could have guessed is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from .base import CompressorConfig
from .reader import Reader
from .registry import register_compressor
from .scoring import TokenScores, self_information
from .selection import SelectingCompressor, SelectionConfig
from .units import split_units


@dataclass
class SelectiveContextConfig(SelectionConfig):
    """Settings of Selective Context."""

    method: ClassVar[str] = "selective-context"

    scorer: str | None = field(
        default=None, metadata={"help": "hub id or folder of the causal LM that scores; default: the reader itself"}
    )
    context: Literal["passage", "sentence"] = field(
        default="passage",
        metadata={"help": "what a token is guessed from: the passage before it, or (the paper) its own sentence alone"},
    )
    window: int = field(default=2048, metadata={"help": "longest stretch of text that the scorer reads at once"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context not in ("passage", "sentence"):
            raise ValueError(f"context must be 'passage' or 'sentence', got {self.context!r}.")
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window must be an integer of at least 2, got {self.window!r}.")


@register_compressor
class SelectiveContextCompressor(SelectingCompressor):
    """Keeps the units with the highest mean self-information ``-log p(token | before)`` (arXiv 2310.06201).

    Nothing is trained. The scorer reads every token once. Beyond the paper: the budget is exact, a token is guessed from
    the whole passage before it (``context="sentence"`` is the paper's way), phrases need no parser, and white space is not
    collapsed. Questions are ignored.

    Args:
        config: the settings.
        reader: the reader; its tokens are what the budget counts.
        scorer: the causal LM that scores, in place of loading ``config.scorer``.
    """

    config_class: ClassVar[type[CompressorConfig]] = SelectiveContextConfig
    config: SelectiveContextConfig

    def __init__(self, config: SelectiveContextConfig, reader: Reader, *, scorer: Reader | None = None) -> None:
        super().__init__(config, reader)
        if scorer is None:
            scorer = reader if config.scorer is None else Reader.from_pretrained(config.scorer, device=reader.device)
        self._scorer = (scorer,)  # a tuple, as for the reader: held, not owned

    @property
    def scorer(self) -> Reader:
        """The causal LM that scores."""
        return self._scorer[0]

    def identity_parts(self) -> list[Any]:
        """Reader and scorer."""
        return [*super().identity_parts(), self.scorer.fingerprint]

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


def _join(parts: Sequence[tuple[int, TokenScores]]) -> TokenScores:
    """One text's scores out of its sentences', each with the character at which it starts."""
    ids = [i for _, part in parts for i in part.ids]
    offsets = [(start + a, start + b) for start, part in parts for a, b in part.offsets]
    return TokenScores(ids, offsets, torch.cat([part.nll for _, part in parts]) if parts else torch.zeros(0))
