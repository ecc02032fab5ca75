"""Activation Beacon: tokens between those of a passage gather it, with projections of their own; their pairs are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, soft_batches
from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import CompressedPassage
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin, attention_inputs
from ..reader.kv import join
from ..reader.plan import Layout, PromptPlan
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import interleaved, random_token_rows
from ..slots.segments import Segment, SegmentSettings, in_turn
from .encode import KVSlots, cached_layers, drop_idle_lora
from .memory_slots import KVSegmentCompressor


@dataclass
class BeaconConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of Activation Beacon."""

    method: ClassVar[str] = "beacon"
    title: ClassVar[str] = "Activation Beacon"
    retired_unhashed: ClassVar[Mapping[str, Any]] = {**SegmentSettings.retired_unhashed, "projections": "lora"}

    segment_tokens: int = setting(1024, "window: tokens read at once (the paper: 1,024 or 2,048)", kw_only=True)
    target_modules: tuple[str, ...] | None = setting(
        None,
        "modules that get LoRA at beacons; default: query, key and value projections, or the fused one",
        kw_only=True,
    )

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1})
        self.check_segments()
        self.check_lora()


@register_compressor
class BeaconCompressor(KVSegmentCompressor):
    """Activation Beacon (arXiv 2401.03462).

    A window of a passage is read as ``[run][beacon][run][beacon]...``, one beacon after each run of ``ratio`` tokens.
    Beacons have projections of their own for queries, keys and values; all other tokens pass through the reader's own
    weights. The beacons' keys and values of all layers are kept. The next window attends to them, at consecutive positions,
    in place of the windows before it. A later window sees as many of them as the reader's positions allow, the last ones.

    Differences from the paper: the projections are LoRA on the reader's, not full copies. The prompt's BOS stays visible. The
    reader does not compress what it writes.

    Attributes:
        encoder: the reader's `LoRATwin`, whose LoRA acts at beacons only.
        beacon: ``[1, width]`` embedding of a beacon, which starts as that of the end-of-sequence token.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions.
    """

    config_class: ClassVar[type[BeaconConfig]] = BeaconConfig
    config: BeaconConfig
    encoder: Any  # a `LoRATwin`, or one with `only_at`

    def __init__(self, config: BeaconConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        targets = config.target_modules or attention_inputs(reader.model.get_decoder(), keys=True)
        lora = config.lora
        lora["target_modules"] = targets
        self.encoder = LoRATwin(reader.model, **lora)
        drop_idle_lora(self.encoder)
        eos = reader.eos_id
        with torch.no_grad():
            row = None if eos is None else reader.embed(torch.tensor([eos], device=reader.device)).float()
        self.beacon = nn.Parameter(random_token_rows(reader, 1) if row is None else row.clone())

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or what fits the reader's positions with a beacon for each run."""
        limit, most = self.max_positions, self.config.segment_tokens
        room = most if limit is None else int((limit - len(self.opening)) / (1 + 1 / (ratio or 1.0)))
        return max(min(most, room), 1)

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the beacons: all first windows are read in one pass, then all second ones, and so on."""
        before: dict[int, list[KVSlots]] = {}
        made: dict[int, KVSlots] = {}
        place = {id(segment): i for i, segment in enumerate(segments)}
        for group in in_turn(segments):
            past = [self.join(before.setdefault(segment.passage, [])) for segment in group]
            for segment, slots in zip(group, self.read(group, past)):
                before[segment.passage].append(slots)
                made[place[id(segment)]] = slots
        return [made[i] for i in range(len(segments))]

    def sequences(self, segments: Sequence[Segment]) -> list[SoftSequence]:
        """``[front][run][beacon][run][beacon]...`` of each window."""
        return interleaved(segments, self.beacon)

    def read(self, segments: Sequence[Segment], past: Sequence[KVSlots]) -> list[KVSlots]:
        """Beacons of one window per passage, after the beacons of the windows before it."""
        reader, placement, made = self.base_reader, self.base_reader.kv_placement, dict[int, KVSlots]()
        sequences, kept = self.sequences(segments), []
        for sequence, segment, slots in zip(sequences, segments, past):
            room = len(slots.positions) if self.max_positions is None else self.max_positions - len(sequence.ids)
            held = len(slots.positions)
            kept.append(slots.chosen(torch.arange(max(held - max(room, 0), 0), held)))
            at = torch.arange(len(sequence.ids))
            sequence.positions = at + (at >= len(segment.front)) * len(kept[-1].positions)
        for batch in soft_batches(sequences, reader.embed, reader.device, budget=self.batch_positions):
            plans = [PromptPlan(kv=as_passage(len(segments[i].front), kept[i])) for i in batch.which]
            cache, mask = None, batch.mask
            if any(plan.kv for plan in plans):
                cache, at = join(placement, plans, reader.dtype, reader.device)
                time = torch.arange(mask.shape[1], device=mask.device)
                real = time < torch.tensor(batch.lengths, device=mask.device)[:, None]
                mask = placement.mask(at, Layout(mask, real, batch.positions, time[:0], None), reader.dtype)
            where = torch.zeros_like(batch.mask, dtype=torch.bool)
            for row, i in enumerate(batch.which):
                where[row, sequences[i].places] = True
            with self.encoder.only_at(where):
                layers = cached_layers(self.encoder.decoder, batch.embeds, mask, batch.positions, cache)
            for row, i in enumerate(batch.which):
                made[i] = KVSlots.at(layers, batch.positions, row, sequences[i].places)
        return [made[i] for i in range(len(segments))]


def as_passage(start: int, slots: KVSlots) -> list[tuple[int, CompressedPassage]]:
    """What `join` takes: the place of the first slot, and the slots as a passage; nothing without slots."""
    if not len(slots.positions):
        return []
    found: tuple[Tensor, ...] = slots.keys
    about = {"keys": found, "values": slots.values, "positions": slots.positions}
    return [(start, CompressedPassage("kv", len(slots.positions), "past", "past", **about))]  # type: ignore[arg-type]
