"""LCLM: means of a small LM's last states over runs of tokens, through an MLP, are the slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, ReaderTuningSettings, tuned_reader
from ..encoders.small_lm import SmallLMEncoder
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.pooling import token_states
from ..slots.projector import learned_scale, matching_factor, mlp, scaled
from ..slots.segments import OwnEncoder, Segment, SegmentSettings, SlotPerToken, slot_of_token


@dataclass
class LCLMConfig(SegmentSettings, LoRASettings, ReaderTuningSettings, CompressorConfig):
    """Settings of LCLM."""

    method: ClassVar[str] = "lclm"
    title: ClassVar[str] = "LCLM"
    cost: ClassVar[str] = "states"
    retired_unhashed: ClassVar[Mapping[str, Any]] = {**SegmentSettings.retired_unhashed, "scale": "matched"}

    segment_tokens: int = setting(1024, "longest segment, in encoder tokens", kw_only=True)
    encoder: str = setting(
        "lora", "'lora': the reader plus LoRA; else the id or folder of a smaller causal LM, trained whole (the paper)"
    )
    adapter_width: int | None = setting(None, "width of the MLP's hidden layer; default: the reader's width")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "adapter_width": 1}, optional=("adapter_width",))
        self.check_segments()
        self.check_lora()
        self.check_reader_tuning()


@register_compressor
class LCLMCompressor(OwnEncoder, SlotPerToken):
    r"""Latent-context LM (LCLM, arXiv 2606.09659).

    A small causal LM with its own tokenizer reads a segment. The means of its last hidden states over runs of ``ratio`` tokens
    become the slots: :math:`z = s \cdot \mathrm{MLP}(\mathrm{RMSNorm}(\bar h))` with one hidden layer and GELU. In the
    paper encoder, MLP and reader are trained, in this order (``tune_reader`` trains a LoRA of the reader).

    Beyond the paper: the encoder may be the reader with LoRA. A passage gets ``ceil(L / ratio)`` slots in the reader's
    tokens. s starts where slots have the norm of the reader's embeddings.

    Args:
        encoder_model: a `SmallLMEncoder`, instead of loading ``config.encoder``.

    Attributes:
        encoder: a `LoRATwin` of the reader, or a `SmallLMEncoder`.
        norm, mlp: RMSNorm over pooled states; Linear, GELU, Linear to the reader's width.
        log_scale: logarithm of s.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
    """

    config_class: ClassVar[type[LCLMConfig]] = LCLMConfig
    interface: ClassVar[Interface] = "embeds"
    config: LCLMConfig

    def __init__(self, config: LCLMConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None) -> None:
        super().__init__(config, reader)
        self.encoder = self.make_encoder(config, encoder_model)
        self.log_scale: nn.Parameter | None = None
        sample = [probe(self.source.vocab_size, self.longest_segment(None), 8, self.opening)]
        with torch.no_grad():
            size = self.pooled(sample).shape[1]
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.mlp = mlp((size, config.adapter_width or reader.width, reader.width), nn.GELU)
        self.to(reader.device)
        with torch.no_grad():
            factor = matching_factor(torch.cat(list(self.encode_segments(sample))), reader)
        self.log_scale = learned_scale(factor, reader)
        self.reader_twin = tuned_reader(self)

    def owners(self, segments: Sequence[Segment]) -> Tensor:
        """``[all tokens]``: the slot of each; even runs."""
        return slot_of_token([len(segment.ids) for segment in segments], [segment.slots for segment in segments])

    def pooled(self, segments: Sequence[Segment]) -> Tensor:
        """``[all slots, encoder width]`` mean states of each slot's run of tokens."""
        device = self.base_reader.device
        states = torch.cat(token_states(self.encoder, segments, self.source.embed, device, self.batch_positions))
        where = self.owners(segments).to(states.device)
        total = states.new_zeros(sum(s.slots for s in segments), states.shape[1]).index_add(0, where, states)
        return total / torch.bincount(where, minlength=len(total)).clamp(min=1)[:, None]

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Pooled states through the MLP."""
        found = self.pooled(segments).to(self.norm.weight)
        slots = scaled(self.mlp(self.norm(found)), self.log_scale)
        return slots.split([segment.slots for segment in segments])
