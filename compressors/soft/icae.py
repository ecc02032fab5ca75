"""ICAE: the reader plus LoRA reads a passage and memory tokens; its states at those are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import CompressorConfig, check_choices, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, ReaderTuningSettings, tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import MemoryTokenCompressor, probe, random_token_rows
from ..slots.pooling import GatedPool
from ..slots.projector import check_width, learned_scale, matching_factor, scaled, scaled_identity
from ..slots.question import QuerySettings
from ..slots.segments import Segment, SegmentSettings

_RESIDUAL_START = 0.1  # initial share of the encoder beside the pooled embeddings


@dataclass
class ICAEConfig(SegmentSettings, LoRASettings, QuerySettings, ReaderTuningSettings, CompressorConfig):
    """Settings of ICAE."""

    method: ClassVar[str] = "icae"
    title: ClassVar[str] = "ICAE"
    retired: ClassVar[dict[str, Any]] = dict(
        fixed_slots=False, special_tokens=False, truncate=None, bos=True, bos_once=False, as_prompt=False
    )

    mem_size: int = setting(128, "memory tokens: the most slots of a segment")
    projector: Literal["none", "scale", "linear"] = setting(
        "scale", "'none' (the paper), 'scale': one factor, 'linear': a matrix that starts as that factor"
    )
    positions: Literal["spread", "append"] = setting(
        "spread",
        "position ids of the memory tokens: 'append' counts on after the segment (the paper), 'spread' puts each at "
        "the middle of the tokens that it stands for",
    )
    residual: bool = setting(True, "add the gated pooled embeddings of each slot's tokens; not in the paper")

    def __post_init__(self) -> None:
        check_counts(self, {"mem_size": 1})
        check_choices(self, {"projector": ("none", "scale", "linear"), "positions": ("spread", "append")})
        self.check_segments()
        self.check_lora()
        self.check_query()
        self.check_reader_tuning()


@register_compressor
class ICAECompressor(MemoryTokenCompressor):
    """In-context autoencoder (ICAE, arXiv 2307.06945).

    The reader plus LoRA reads ``[BOS][segment][memory tokens]``. Its last hidden states (after the final norm) at the memory
    tokens are the segment's slots. The plain reader, without LoRA, reads them.

    Beyond the paper: slots are proportional to the segment, so that a short passage never grows and one checkpoint serves
    every ratio (train it on random ratios). Slots start on the scale of the reader's embeddings. Memory tokens start as
    embeddings of random tokens. Their position ids are spread over the segment (arXiv 2409.14364), because rotary attention
    learns a constant distance sooner. With ``residual`` every slot starts as the pooled embeddings of its tokens
    (`GatedPool`), so that training starts from readable slots.

    Attributes:
        encoder: the reader's `LoRATwin`.
        memory: ``[mem_size, width]`` memory embeddings.
        pool: the `GatedPool`, or ``None``.
        log_scale, linear: the projector; ``None`` if not used.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class = ICAEConfig
    interface: ClassVar[Interface] = "embeds"
    config: ICAEConfig
    encoder: LoRATwin

    def __init__(self, config: ICAEConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        longest = self.longest_segment(config.ratio)
        self.encoder = LoRATwin(reader.model, **config.lora)
        self.memory = nn.Parameter(random_token_rows(reader, config.mem_size))
        self.pool = GatedPool(reader) if config.residual else None
        with torch.no_grad():
            sample = probe(reader.vocab_size, longest, config.mem_size, self.opening)
            found = self.states_at_memory([sample], config.positions)
        check_width(found, reader, "ICAE needs both alike")
        factor = matching_factor(found, reader) * (_RESIDUAL_START if config.residual else 1.0)
        self.log_scale = learned_scale(factor, reader) if config.projector == "scale" else None
        self.linear = scaled_identity(factor, reader) if config.projector == "linear" else None
        self.reader_twin = tuned_reader(self)

    @property
    def most_slots(self) -> int:
        """Memory tokens."""
        return self.config.mem_size

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Projected states at the memory tokens, plus the pooled embeddings."""
        found = scaled(self.states_at_memory(segments, self.config.positions), self.log_scale)
        if self.linear is not None:
            found = self.linear(found.to(self.linear.weight.device, self.linear.weight.dtype))
        if self.pool is not None:
            found = found + self.pool(segments).to(found.device)
        return found.split([segment.slots for segment in segments])
