"""Dodo (Nugget2D): a scorer picks tokens of a passage; their keys and values of all layers stand for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.scorer import TokenScorer, best_tokens
from .encode import drop_idle_lora
from .ragged import RaggedSlots
from .selected import SelectedConfig, SelectedTokenCompressor


@dataclass
class DodoConfig(SelectedConfig):
    """Settings of Dodo."""

    method: ClassVar[str] = "dodo"
    title: ClassVar[str] = "Dodo"
    cost: ClassVar[str] = "states"


@register_compressor
class DodoCompressor(SelectedTokenCompressor):
    """Dodo, first called Nugget2D (arXiv 2310.02409).

    The reader plus LoRA reads ``[BOS][segment]``. The scorer of `TokenScorer` picks ``ceil(S / ratio)`` of S tokens, the
    last one always among them. Their keys and values of all layers are the slots, at the tokens' own positions; the reader,
    without LoRA, reads them. For the scorer to learn, the score s of a token is added to the attention scores of its slot,
    as :math:`s - \\mathrm{stop}(s)`: zero, with a gradient.

    Differences from the paper: the reader stays as it is (there a second LoRA reads). States enter the scorer at unit mean
    square. Passages are compressed whole, not while the model writes.

    Attributes:
        encoder: the reader's `LoRATwin`.
        scorer: the scorer.
    """

    config_class = DodoConfig
    config: DodoConfig

    def __init__(self, config: DodoConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        drop_idle_lora(self.encoder)
        self.scorer = TokenScorer(reader, config.scorer_layers)

    def choose(self, scores: Tensor, slots: int) -> Tensor:
        """The best tokens and the last one."""
        return best_tokens(scores, slots, last=1)

    def finish(self, slots: RaggedSlots, scores: Tensor) -> RaggedSlots:
        """A bias of zero through which the scores get a gradient."""
        return replace(slots, bias=scores - scores.detach()) if torch.is_grad_enabled() else slots
