"""PISCO: a LoRA-tuned reader, or a smaller LM, compresses; a LoRA-tuned reader reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import CompressorConfig, check_choices, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.lora_twin import LoRATwin, Twin
from ..encoders.small_lm import SmallLMEncoder
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import MemoryTokenCompressor, probe
from ..slots.projector import check_width, learned_scale, matching_factor, mlp, scaled
from ..slots.question import QuerySettings
from ..slots.segments import OwnEncoder, Segment, SegmentSettings, even_shares


@dataclass
class PISCOConfig(SegmentSettings, LoRASettings, QuerySettings, CompressorConfig):
    """Settings of PISCO."""

    method: ClassVar[str] = "pisco"
    title: ClassVar[str] = "PISCO"
    retired: ClassVar[Mapping[str, Any]] = dict(
        slots="proportional", scale="matched", prefix=None, suffix=[], as_prompt=False
    )

    ratio: float = setting(16.0, "compression ratio if none is asked for", kw_only=True)
    segment_tokens: int = setting(128, "longest segment, in encoder tokens", kw_only=True)
    memory_tokens: int = setting(1, "different <MEM> embeddings: the most of a segment; 1: the same one everywhere")
    encoder: str = setting("lora", "'lora': the reader plus LoRA; else the id or folder of a smaller causal LM")
    connector: Literal["none", "mlp"] | None = setting(
        None, "'mlp': Linear-ReLU-Linear; default: 'mlp' for a smaller LM, else 'none'"
    )
    connector_width: int = setting(4096, "width between the connector's two layers")
    decoder: Literal["lora", "none"] = setting(
        "lora", "'lora': tune the reader of the slots too; 'none': leave it as it is"
    )
    r: int = lora_rank(16, ", of encoder and decoder")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "memory_tokens": 1, "connector_width": 1})
        check_choices(self, {"connector": (None, "none", "mlp"), "decoder": ("lora", "none")})
        self.check_segments()
        self.check_lora()
        self.check_query()


@register_compressor
class PISCOCompressor(OwnEncoder, MemoryTokenCompressor):
    """PISCO (arXiv 2501.16075) and its predecessor COCOM (arXiv 2407.09252).

    The encoder reads ``[BOS][segment][<MEM> ...]``. Its last hidden states (after the final norm) at the <MEM> tokens, passed
    through the connector, are the segment's slots. The encoder is the reader with LoRA, or a smaller causal LM that is trained
    whole. The reader is tuned with a second LoRA: use ``compressor.reader``.

    Training is sequence-level distillation: the objective ``lm`` alone, on answers of a teacher that reads the full text
    (``base_reader.generate``). COCOM and the version of 2026 also pretrain with ``ae`` and ``lm`` (continuation).

    Beyond the papers: a passage gets ``ceil(L / ratio)`` slots, shared evenly among its segments, so that it never grows and
    nothing is cut off. Slots start on the scale of the reader's embeddings.

    Args:
        encoder_model: a `SmallLMEncoder`, instead of loading ``config.encoder``.

    Attributes:
        encoder: a `LoRATwin` of the reader, or a `SmallLMEncoder`.
        memory: ``[memory_tokens, encoder width]`` embeddings of the <MEM> tokens.
        connector: ``[n, encoder width] -> [n, width]``, or ``None``.
        decoder: the `LoRATwin` that ``reader`` reads with (``decoder="lora"`` only).

    Raises:
        ValueError: if the widths of encoder and reader differ and there is no connector, or positions are too few.
    """

    config_class: ClassVar[type[PISCOConfig]] = PISCOConfig
    interface: ClassVar[Interface] = "embeds"
    config: PISCOConfig

    def __init__(self, config: PISCOConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None) -> None:
        super().__init__(config, reader)
        self.encoder = self.make_encoder(config, encoder_model)
        longest, vocabulary = self.longest_segment(None), self.source.vocab_size
        with torch.no_grad():
            rows = self.source.embed(torch.randperm(vocabulary)[: config.memory_tokens].to(reader.device)).float()
            self.memory = nn.Parameter(rows[torch.arange(config.memory_tokens) % len(rows)].clone())
        self.connector: nn.Sequential | None = None
        if (config.connector or ("none" if config.encoder == "lora" else "mlp")) == "mlp":
            self.connector = mlp((rows.shape[-1], config.connector_width, reader.width), nn.ReLU).to(reader.device)
        self.log_scale: nn.Parameter | None = None
        with torch.no_grad():
            found = self._project(self.states_at_memory([probe(vocabulary, longest, 1, [])]))
        self.log_scale = learned_scale(matching_factor(found, reader), reader)
        self.decoder: Twin | None = None
        if config.decoder == "lora":
            self.decoder = LoRATwin(reader.model, **config.lora)
            self.adapt_reader(AdaptedReader(reader, self.decoder))

    @property
    def most_slots(self) -> int:
        """<MEM> tokens."""
        config = self.config
        return config.memory_tokens if config.memory_tokens > 1 else math.ceil(config.segment_tokens / config.ratio) + 1

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Cuts a passage into even segments, with even shares of its slots."""
        most = self.config.memory_tokens
        count = -(-n_tokens // (self.longest_segment(None, question_tokens) or n_tokens))
        total = math.ceil(source_tokens / (ratio or 1.0) - 1e-6)
        if most > 1:
            count = min(max(count, -(-total // most)), n_tokens)
            total = min(total, count * most)
        total = min(max(total, count), source_tokens)
        return list(zip(even_shares(n_tokens, count), even_shares(total, count)))

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Projected states at the <MEM> tokens."""
        return self._project(self.states_at_memory(segments)).split([segment.slots for segment in segments])

    def _project(self, hidden: Tensor) -> Tensor:
        if self.connector is not None:
            weight: Any = self.connector[0].weight
            hidden = self.connector(hidden.to(weight.device, weight.dtype))
        check_width(hidden, self.base_reader, "set connector to 'mlp'")
        return scaled(hidden, self.log_scale)
