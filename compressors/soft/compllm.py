"""CompLLM: the reader plus LoRA reads every 20 tokens on their own, and end-of-text tokens, whose states are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import MemoryTokenCompressor, probe
from ..slots.projector import check_width, matching_factor, scaled_identity
from ..slots.segments import Segment, SegmentSettings


@dataclass
class CompLLMConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of CompLLM."""

    method: ClassVar[str] = "compllm"
    title: ClassVar[str] = "CompLLM"

    ratio: float | None = setting(2.0, "compression ratio if none is asked for (the paper)", kw_only=True)
    segment_tokens: int = setting(20, "longest segment (the paper)", kw_only=True)

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1})
        self.check_segments()
        self.check_lora()


@register_compressor
class CompLLMCompressor(MemoryTokenCompressor):
    """CompLLM (arXiv 2509.19228): tiny segments, each compressed alone.

    The reader plus LoRA reads ``[BOS][segment][EOS]...[EOS]``. Its last hidden states (after the final norm) at the EOS tokens,
    through one linear layer, are the slots. The plain reader reads them. Cost is linear in the passage's length, and a
    segment's slots do not depend on its neighbours.

    Training: the objective ``states``, on answers: the reader's states over the slots equal those over the text.

    Beyond the paper: BOS opens every segment; the linear layer starts as the factor that brings slots to the norm of the
    reader's embeddings. A reader without an EOS token gets its last token instead.

    Attributes:
        encoder: the reader's `LoRATwin`.
        linear: ``[n, width] -> [n, width]``.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class = CompLLMConfig
    interface: ClassVar[Interface] = "embeds"
    config: CompLLMConfig

    def __init__(self, config: CompLLMConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        eos = reader.vocab_size - 1 if reader.eos_id is None else reader.eos_id
        with torch.no_grad():
            self.memory = reader.embed(torch.tensor([eos], device=reader.device)).float()
            found = self.states_at_memory([probe(reader.vocab_size, config.segment_tokens, 4, self.opening)])
        check_width(found, reader, "CompLLM needs both alike")
        self.linear = scaled_identity(matching_factor(found, reader), reader)

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Projected states at the EOS tokens."""
        weight = self.linear.weight
        found = self.linear(self.states_at_memory(segments).to(weight.device, weight.dtype))
        return found.split([segment.slots for segment in segments])
