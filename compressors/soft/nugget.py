"""Nugget: a scorer picks tokens of a passage; their last states stand for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.pooling import token_states
from ..slots.projector import matching_factor
from ..slots.scorer import TokenScorer, best_tokens
from ..slots.segments import Segment, SegmentSettings, SlotPerToken


@dataclass
class NuggetConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of Nugget."""

    method: ClassVar[str] = "nugget"
    title: ClassVar[str] = "Nugget"
    cost: ClassVar[str] = "states"

    segment_tokens: int = setting(1024, "longest segment", kw_only=True)
    scorer_layers: int = setting(3, "layers of the reader whose states the scorer reads")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "scorer_layers": 2})
        self.check_segments()
        self.check_lora()


@register_compressor
class NuggetCompressor(SlotPerToken):
    """Nugget (arXiv 2310.01732) on a decoder-only reader.

    The reader plus LoRA reads ``[BOS][segment]``. The scorer of `TokenScorer` picks ``ceil(S / ratio)`` of S tokens, the
    last one always among them. Their last hidden states, through a linear layer, are the slots.

    Differences from the paper: there an encoder-decoder attends to the states, and each score is added to the attention
    scores. The reader takes slots as embeddings, so the scorer gets its gradient from the slot times :math:`1 + s -
    \\mathrm{stop}(s)`, a factor of one. A causal encoder instead of one that reads both ways; the linear layer starts as a
    scaling to the norm of the reader's embeddings; the reader stays as it is.

    Attributes:
        encoder: the reader's `LoRATwin`.
        scorer: the scorer.
        projector: the linear layer.

    Raises:
        ValueError: if the reader has too few layers.
    """

    config_class = NuggetConfig
    interface: ClassVar[Interface] = "embeds"
    config: NuggetConfig

    def __init__(self, config: NuggetConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        self.scorer = TokenScorer(reader, config.scorer_layers)
        sample = probe(reader.vocab_size, self.longest_segment(None), 1, self.opening)
        with torch.no_grad():
            (states,) = self.states([sample])
            self.projector = nn.Linear(states.shape[1], reader.width, device=reader.device)
            nn.init.zeros_(self.projector.bias)
            if states.shape[1] == reader.width:
                nn.init.eye_(self.projector.weight)
            self.projector.weight *= matching_factor(self.projector(states.float()), reader)

    def states(self, segments: Sequence[Segment]) -> list[Tensor]:
        """``[tokens, hidden]`` last states per segment."""
        reader = self.base_reader
        return token_states(self.encoder, segments, reader.embed, reader.device, self.batch_positions)

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Projected states at the chosen tokens."""
        dtype, made = self.projector.weight.dtype, []
        for segment, scores, states in zip(
            segments, self.scorer(segments, self.batch_positions), self.states(segments)
        ):
            chosen = best_tokens(scores, segment.slots, last=1)
            factor = 1 + scores[chosen] - scores[chosen].detach()
            made.append(states[chosen].to(dtype) * factor[:, None].to(dtype))
        return self.projector(torch.cat(made)).split([segment.slots for segment in segments])
