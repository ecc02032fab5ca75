"""Base class of methods that give ragged keys and values per segment: pairs at places of their own, with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import CompressorConfig
from ..reader.attention import check_reachable
from ..reader.kv import ROTARY
from ..reader.reader import Reader
from ..slots.segments import SlotPerToken
from .encode import KVSlots
from .memory_slots import KVSegmentCompressor


@dataclass
class RaggedSlots(KVSlots):
    """Keys and values of a segment, as many in every head, at positions of their own.

    Attributes:
        positions: ``[slots]``, or ``[layers, kv_heads, slots]`` where heads differ; those in the segment come after the BOS.
        bias: ``[slots]``, added to the attention scores of each, or ``None``.
        tokens: positions that the segment occupies.
    """

    bias: Tensor | None = None
    tokens: int = 0


class RaggedSegmentCompressor(SlotPerToken, KVSegmentCompressor):
    """Packages `RaggedSlots`: a passage keeps its length in positions, and its pairs stay at theirs.

    Raises:
        ValueError: if the reader's keys cannot move, its attention cannot take a bias, or its layers differ in shape.
    """

    config: Any

    def __init__(self, config: CompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        check_reachable(reader.model)
        if len(shapes := sorted(set(self.slot_shapes))) > 1:
            raise ValueError(f"{self.config.method} needs layers of one shape, and {reader.name!r} has {shapes}.")

    def join(self, parts: Sequence[KVSlots]) -> RaggedSlots:
        """The slots of a passage; keys of later segments are turned to their positions in it."""
        placement, turned, before = self.base_reader.kv_placement, list[KVSlots](), 0
        for part in parts:
            delta = torch.tensor([before], device=self.base_reader.device)
            moves = [before and kind == ROTARY for kind in placement.kinds]
            keys = [placement.rotate(k, delta, i) if moves[i] else k for i, k in enumerate(part.keys)]
            turned.append(KVSlots(tuple(keys), part.values, part.positions + before))
            before += part.tokens if isinstance(part, RaggedSlots) else 0
        whole = super().join(turned)
        biases = [part.bias for part in parts if isinstance(part, RaggedSlots) and part.bias is not None]
        return RaggedSlots(whole.keys, whole.values, whole.positions, torch.cat(biases) if biases else None, before)

    def slot_fields(self, slots: KVSlots) -> dict[str, Any]:
        """The fields of a ragged passage."""
        if not isinstance(slots, RaggedSlots):
            raise TypeError(f"RaggedSlots are wanted, got {type(slots).__name__}.")
        layers, (heads, n, _) = len(slots.keys), slots.keys[0].shape
        keys, values = (torch.cat([layer.flatten(0, 1) for layer in side]) for side in (slots.keys, slots.values))
        return {
            "keys": (keys,),
            "values": (values,),
            "positions": slots.positions.to(keys.device, torch.int32).expand(layers, heads, n).flatten(),
            "counts": torch.full((layers, heads), n, dtype=torch.int32),
            "bias": None if slots.bias is None else slots.bias.to(keys).repeat(layers * heads),
            "span": (len(self.opening), slots.tokens),
        }
