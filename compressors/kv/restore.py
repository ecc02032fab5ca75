"""RestoreKV: most pairs of a passage are evicted, and a few tokens that have read all of them are kept beside the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import pack, pass_positions, soft_batches
from ..core.config import CompressorConfig, check_choices, check_counts, setting
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import memory_sequences, random_token_rows
from ..slots.segments import Segment, SegmentSettings
from .encode import cached_layers, drop_idle_lora
from .probing import read, write_probes
from .ragged import RaggedSegmentCompressor, RaggedSlots
from .selection import SCORES

_SCORES = {name: needs for name, (_, needs) in SCORES.items() if needs != "query"}


@dataclass
class RestoreConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of RestoreKV."""

    method: ClassVar[str] = "restore-kv"
    title: ClassVar[str] = "RestoreKV"
    cost: ClassVar[str] = "probes"

    segment_tokens: int = setting(1024, "longest segment", kw_only=True)
    restore_tokens: int = setting(8, "learned tokens of a segment; at most half of its slots")
    score: str = setting("probes", f"what ranks the pairs, as in kv-match: {', '.join(_SCORES)}")
    probes: int = setting(48, "rule-made questions per segment (score probes)")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "restore_tokens": 1, "probes": 1})
        check_choices(self, {"score": _SCORES})
        self.check_segments()
        self.check_lora()


@register_compressor
class RestoreCompressor(RaggedSegmentCompressor):
    """RestoreKV (arXiv 2608.01247).

    Of the slots of a segment, some are its best pairs, in each head those of the highest score, as the reader computed them at
    their places. The others are the keys and values at learned tokens, which LoRA reads after the whole segment, before
    anything is evicted: ``[BOS][segment][restore tokens]``. LoRA acts at these tokens alone. So they hold what the evicted
    pairs held, at the same budget. The reader, without LoRA, reads both.

    Differences from the paper: every head keeps as many pairs. A segment of fewer than twice ``restore_tokens`` slots has fewer
    of them.

    Attributes:
        encoder: the reader's `LoRATwin`, whose LoRA acts at the restore tokens only.
        memory: ``[restore_tokens, width]`` embeddings of the restore tokens.
    """

    config_class = RestoreConfig
    config: RestoreConfig

    def __init__(self, config: RestoreConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        drop_idle_lora(self.encoder)
        self.memory = nn.Parameter(random_token_rows(reader, config.restore_tokens))

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or what fits the reader's positions with as many for what is read after it."""
        most = super().longest_segment(ratio)
        limit = self.max_positions
        return most if limit is None else max(min(most, limit // 2), 1)

    def encode_segments(self, segments: list[Segment]) -> list[RaggedSlots]:
        """The best pairs and those at the restore tokens."""
        reader, made = self.base_reader, dict[int, RaggedSlots]()
        kept = self.best_pairs(segments)
        restored = [min(self.config.restore_tokens, segment.slots // 2) for segment in segments]
        rows = [self.memory[:n] for n in restored]
        after = [Segment(s.ids, n, s.front) for s, n in zip(segments, restored)]
        sequences = memory_sequences(after, rows, "append")
        for batch in soft_batches(sequences, reader.embed, reader.device, budget=self.batch_positions):
            where = torch.zeros_like(batch.mask, dtype=torch.bool)
            for row, i in enumerate(batch.which):
                where[row, sequences[i].places] = True
            with self.encoder.only_at(where):
                layers = cached_layers(self.encoder.decoder, batch.embeds, batch.mask, batch.positions)
            for row, i in enumerate(batch.which):
                tail = torch.tensor(sequences[i].places, dtype=torch.long, device=kept[i].device).expand(
                    *kept[i].shape[:2], -1
                )
                at = torch.cat([kept[i] + len(segments[i].front), tail], -1)  # [layers, kv_heads, slots]
                keys, values = (
                    tuple(
                        pair[side][row].gather(1, at[n][..., None].expand(-1, -1, pair[side].shape[-1]))
                        for n, pair in enumerate(layers)
                    )
                    for side in (0, 1)
                )
                made[i] = RaggedSlots(keys, values, at, tokens=len(segments[i].ids) + restored[i])
        return [made[i] for i in range(len(segments))]

    @torch.no_grad()
    def best_pairs(self, segments: list[Segment]) -> list[Tensor]:
        """``[layers, kv_heads, pairs]`` tokens of each segment, in order: the slots that are left for pairs."""
        reader, needs, made = self.base_reader, _SCORES[self.config.score], dict[int, Tensor]()
        asked: list[list[list[int]]] = [[] for _ in segments]
        for i, segment in enumerate(segments if needs != "nothing" else []):
            room = None if self.max_positions is None else self.max_positions - len(self.opening) - len(segment.ids)
            asked[i] = write_probes(reader, reader.decode(segment.ids), needs, self.config.probes, None, room)
        sizes = [len(segment.ids) + sum(map(len, probes)) for segment, probes in zip(segments, asked)]
        score = SCORES[self.config.score][0]
        for which in pack(sizes, self.batch_positions, pass_positions(reader.device)):
            evidence = read(reader, [segments[i].ids for i in which], [asked[i] for i in which])
            layers = [score(layer, evidence, reader.kv_placement, i) for i, layer in enumerate(evidence.layers)]
            for i, scores in zip(which, torch.stack(layers, 1)):
                scores = scores[..., : len(segments[i].ids)]
                if not evidence.start:  # without a BOS the first token is the attention sink
                    scores[..., 0] = torch.inf
                pairs = segments[i].slots - min(self.config.restore_tokens, segments[i].slots // 2)
                made[i] = scores.argsort(dim=-1, descending=True, stable=True)[..., :pairs].sort(-1).values
        return [made[i] for i in range(len(segments))]
