"""ARC-Encoder: an LM without its last layers reads in both directions; queries pooled over runs of tokens become the slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import CompressorConfig, check_counts, setting
from ..core.hidden import hide
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.lora_twin import LoRATwin, Twin, share
from ..encoders.pooled_queries import PooledQueries, cut_layers
from ..encoders.small_lm import SmallLMEncoder
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.projector import learned_scale, matching_factor, scaled
from ..slots.segments import OwnEncoder, Segment, SegmentSettings, SlotPerToken


@dataclass
class ARCEncoderConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of ARC-Encoder."""

    method: ClassVar[str] = "arc-encoder"
    title: ClassVar[str] = "ARC-Encoder"
    cost: ClassVar[str] = "states"
    retired: ClassVar[Mapping[str, Any]] = {"scale": "matched"}

    segment_tokens: int = setting(512, "longest segment, in encoder tokens", kw_only=True)
    encoder: str = setting(
        "lora", "'lora': the reader plus LoRA; else the id or folder of a smaller causal LM, trained whole"
    )
    dropped_layers: int = setting(2, "last layers of the encoder that are left out")
    bridge_width: int = setting(2048, "width between the two linear layers after the encoder")
    r: int = lora_rank(16)

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "dropped_layers": 0, "bridge_width": 1})
        self.check_segments()
        self.check_lora()


@register_compressor
class ARCEncoderCompressor(OwnEncoder, SlotPerToken):
    """ARC-Encoder (arXiv 2510.20535).

    The encoder is a causal LM without its last layers, final norm and causal mask. Before its last layer, states are averaged
    in runs of ``ratio`` tokens. The averages are that layer's queries; its keys and values are those of all tokens
    (`PooledQueries`). The bridge, two linear layers, makes slots of its output. The reader stays as it is.

    Beyond the paper: the encoder may be the reader with LoRA. A passage gets ``ceil(L / ratio)`` slots in the reader's tokens.
    Slots start on the scale of the reader's embeddings. Prompts in words replace the learned vectors that ask for a
    continuation or a repetition.

    Args:
        encoder_model: a `SmallLMEncoder`, instead of loading ``config.encoder``.

    Attributes:
        encoder: a `LoRATwin` of the reader without its last layers, or a `SmallLMEncoder` without them.
        bridge: the two linear layers, ``[n, encoder width] -> [n, width]``.
        log_scale: logarithm of the output factor.

    Raises:
        ValueError: if fewer than two layers are left, or the encoder adds positions to its embeddings.
    """

    config_class: ClassVar[type[ARCEncoderConfig]] = ARCEncoderConfig
    interface: ClassVar[Interface] = "embeds"
    config: ARCEncoderConfig
    run: PooledQueries

    def __init__(
        self, config: ARCEncoderConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None
    ) -> None:
        super().__init__(config, reader)
        self.encoder: Twin
        if config.encoder == "lora":
            model = share(reader.model)
            cut_layers(model.get_decoder(), config.dropped_layers)
            self.encoder = LoRATwin(model, **config.lora)
        else:
            self.encoder = (encoder_model or SmallLMEncoder.from_pretrained(config.encoder)).to(reader.device)
            cut_layers(self.encoder.decoder, config.dropped_layers)
        hide(self, "run", PooledQueries(self.encoder.decoder))
        sample = [probe(self.source.vocab_size, config.segment_tokens, 8, [])]
        states = self.pooled_states(sample)[0].detach()
        first = nn.Linear(states.shape[-1], config.bridge_width, bias=False)
        self.bridge = nn.Sequential(first, nn.Linear(config.bridge_width, reader.width, bias=False)).to(reader.device)
        with torch.no_grad():
            factor = matching_factor(self.bridge(states.float()), reader)
        self.log_scale: nn.Parameter | None = learned_scale(factor, reader)

    @property
    def opening(self) -> list[int]:
        """Nothing: all tokens see each other."""
        return []

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or the encoder's positions; slots take none of them."""
        return min(self.config.segment_tokens, self.max_positions or self.config.segment_tokens)

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Bridged states of the pooled queries."""
        return [self.project(states) for states in self.pooled_states(segments)]

    def project(self, states: Tensor) -> Tensor:
        """States ``[n, encoder width]`` through the bridge, scaled: ``[n, width]``."""
        weight = next(self.bridge.parameters())
        return scaled(self.bridge(states.to(weight.device, weight.dtype)), self.log_scale)

    def pooled_states(self, segments: Sequence[Segment]) -> list[Tensor]:
        """``[slots, encoder width]`` per segment, in batches of similar length."""
        made, device = dict[int, Tensor](), self.base_reader.device
        for which in pack([len(s.ids) for s in segments], self.batch_positions, pass_positions(device)):
            ids, slots = [segments[i].ids for i in which], [segments[i].slots for i in which]
            rows = self.run(self.source.embed(pad_rows(ids)[0].to(device)), list(map(len, ids)), slots)
            made |= {i: row[:n] for i, row, n in zip(which, rows, slots)}
        return [made[i] for i in range(len(segments))]
