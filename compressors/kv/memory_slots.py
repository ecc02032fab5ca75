"""Base class of methods whose slots are the keys and values at appended memory tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.config import CompressorConfig, check_choices, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import Twin
from ..reader.reader import Reader
from ..slots.memory_tokens import memory_rows, memory_sequences
from ..slots.pooling import summed_runs
from ..slots.question import QuerySettings
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings
from .encode import KVSlots, check_movable, encode_kv, kv_shapes


@dataclass
class KVSlotConfig(SegmentSettings, LoRASettings, QuerySettings, CompressorConfig):
    """Settings shared by KV methods with memory tokens."""

    retired: ClassVar[Mapping[str, Any]] = {"fixed_slots": False, "bos": True, "as_prompt": False}

    ratio: float | None = setting(
        None, "compression ratio if none is asked for; null: as many slots as allowed", kw_only=True
    )
    positions: Literal["append", "spread"] = setting(
        "append",
        "position ids of the slots: 'append' counts on after the segment (the papers), 'spread' puts each at the "
        "middle of the tokens that it stands for",
    )
    residual: bool = setting(
        False,
        "add the pooled embeddings of each slot's tokens to its memory embedding, so that training starts from "
        "readable slots; not in the papers",
    )

    def __post_init__(self) -> None:
        check_choices(self, {"positions": ("append", "spread")})
        self.check_segments()
        self.check_lora()
        self.check_query()


class KVSegmentCompressor(SegmentCompressor):
    """Base class of methods that give one dense set of keys and values per segment (`KVSlots`).

    Attributes:
        slot_shapes: ``(kv_heads, width of a key, width of a value)`` per layer.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    interface: ClassVar[Interface] = "kv"

    def __init__(self, config: CompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        check_movable(reader)
        self.slot_shapes = kv_shapes(reader)
        self.longest_segment(self.ratio_or_default(None))

    @property
    def max_positions(self) -> int | None:
        """The reader's positions, within its attention window."""
        limits = (self.base_reader.max_positions, self.base_reader.kv_placement.max_length)
        return min((n for n in limits if n is not None), default=None)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Raises ``ValueError``: checkpointing drops the cache, which holds the slots."""
        raise ValueError(
            f"{type(self).__name__} keeps keys and values, which transformers drops while it checkpoints gradients; set "
            "gradient_checkpointing: false, and lower batch_size or batch_positions to save memory."
        )

    def join(self, parts: Sequence[KVSlots]) -> KVSlots:
        """The slots of a passage, in the reader's dtype."""
        reader = self.base_reader
        like: dict[str, Any] = {"dtype": reader.dtype, "device": reader.device}
        if not parts:
            keys = tuple(torch.zeros(heads, 0, k, **like) for heads, k, _ in self.slot_shapes)
            return KVSlots(keys, tuple(torch.zeros(heads, 0, v, **like) for heads, _, v in self.slot_shapes))
        layers = range(len(self.slot_shapes))
        keys = tuple(torch.cat([part.keys[i] for part in parts], dim=1).to(reader.dtype) for i in layers)
        values = tuple(torch.cat([part.values[i] for part in parts], dim=1).to(reader.dtype) for i in layers)
        return KVSlots(keys, values, torch.cat([part.positions for part in parts], dim=-1))

    def slot_fields(self, slots: KVSlots) -> dict[str, Any]:
        """Keys, values and positions."""
        return {"keys": slots.keys, "values": slots.values, "positions": slots.positions}


class KVSlotCompressor(KVSegmentCompressor):
    """Base class of methods whose slots are the KV cache at appended memory tokens.

    A tuned copy of the reader reads ``[BOS][segment][memory tokens]``. A method sets ``encoder`` and implements `most_slots`
    and `memory`.

    Attributes:
        encoder: the tuned copy of the reader.
    """

    config: KVSlotConfig
    encoder: Twin

    @abstractmethod
    def memory_embeddings(self) -> Tensor:
        """``[most_slots or 1, width]`` embeddings of the memory tokens, differentiable."""

    def memory_inputs(self, segments: Sequence[Segment]) -> list[Tensor]:
        """``[slots, width]`` input embeddings of each segment's memory tokens, differentiable."""
        rows = memory_rows(self.memory_embeddings(), segments)
        if not self.config.residual:
            return rows
        pooled = summed_runs(self.encoder.lm.get_input_embeddings(), segments).split([s.slots for s in segments])
        return [row + extra.to(row.device) for row, extra in zip(rows, pooled)]

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the memory tokens."""
        sequences = memory_sequences(segments, self.memory_inputs(segments), self.config.positions)
        return encode_kv(self.encoder, sequences, budget=self.batch_positions)
