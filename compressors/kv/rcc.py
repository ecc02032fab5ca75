"""RCC: the reader runs over slots to which every layer adds the encoder's states; their keys and values are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, pack, pad_rows, pass_positions, soft_batches
from ..core.config import CompressorConfig, check_counts, setting
from ..core.hidden import hide
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin, share
from ..encoders.pooled_queries import cut_layers, layer_list
from ..reader.kv import position_arguments
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.segments import Segment, SegmentSettings, slot_of_token
from .encode import KVSlots, adding, cached_layers
from .memory_slots import KVSegmentCompressor


@dataclass
class RCCConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of RCC."""

    method: ClassVar[str] = "rcc"
    title: ClassVar[str] = "RCC"

    ratio: float | None = setting(8.0, "tokens per slot if no ratio is asked for (the paper: 32)", kw_only=True)
    segment_tokens: int = setting(512, "longest segment (the paper: windows of 2,048)", kw_only=True)

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1})
        self.check_segments()
        self.check_lora()


@register_compressor
class RCCCompressor(KVSegmentCompressor):
    r"""Recurrent context compression (RCC, arXiv 2406.06110).

    The reader plus LoRA reads ``[BOS][segment]``. At the last token of each run of ``ratio`` tokens its states of all layers
    are kept: :math:`h^0` (the token's embedding) to :math:`h^{N-1}`. The reader then runs over ``[BOS][slots]``: a slot enters
    as :math:`E h^0`, and after layer i :math:`A_i h^i` is added to it. The keys and values of the slots are the compressed
    segment. Deep layers get what the encoder knew there, where slots from the last layer have to carry everything.

    Differences from the paper: there the sums are formed while the reader answers, with the slots of all windows in one prompt;
    here once, when the passage is compressed, so that nothing is left to do at reading time and slots of different segments do
    not see each other. LoRA instead of two fully trained models; the reader stays as it is. Short passages are not tiled to
    a whole window. E starts as the identity and the :math:`A_i` at zero: at first a slot is read as the token it stands at.

    Attributes:
        encoder: the `LoRATwin` of the reader without its last layer.
        first: E, ``[width, width]``.
        added: :math:`A_1 \dots A_{N-1}`, ``[hidden, hidden]`` each.

    Raises:
        ValueError: if the reader's keys cannot move, or it has fewer than three layers.
    """

    config_class = RCCConfig
    config: RCCConfig
    runs: Any

    def __init__(self, config: RCCConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        model = share(reader.model)
        cut_layers(model.get_decoder(), 1)
        self.encoder = LoRATwin(model, **config.lora)
        hide(self, "runs", share(reader.model))
        layers = layer_list(self.runs.get_decoder())[1]
        hidden = reader.model.config.get_text_config().hidden_size
        self.first = nn.Linear(reader.width, reader.width, bias=False)
        self.added = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(len(layers) - 1))
        nn.init.eye_(self.first.weight)
        for parameter in self.added.parameters():
            nn.init.zeros_(parameter)
        self.to(reader.device)

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or the reader's positions; slots take none of the encoder's."""
        limit = self.max_positions
        most = self.config.segment_tokens
        return most if limit is None else max(min(most, limit - len(self.opening)), 1)

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the slots."""
        embed, device = self.base_reader.embed, self.base_reader.device
        states = self.strided(segments)
        rows = [self.first(row[0].to(self.first.weight)) for row in states]
        sequences = [SoftSequence.with_memory(s.front, row) for s, row in zip(segments, rows)]
        made: dict[int, KVSlots] = {}
        for batch in soft_batches(sequences, embed, device, budget=self.batch_positions):
            width = batch.embeds.shape[1]
            sums = []
            for number, matrix in enumerate(self.added, 1):
                found = [matrix(states[i][number].to(matrix.weight)) for i in batch.which]  # type: ignore[arg-type]
                padded = [
                    nn.functional.pad(row, (0, 0, n - len(row), width - n)) for row, n in zip(found, batch.lengths)
                ]
                sums.append(torch.stack(padded).to(batch.embeds.dtype))
            body = self.runs.get_decoder()
            with adding(list(layer_list(body)[1]), sums):
                layers = cached_layers(body, batch.embeds, batch.mask, batch.positions)
            for row, i in enumerate(batch.which):
                made[i] = KVSlots.at(layers, batch.positions, row, sequences[i].places)
        return [made[i] for i in range(len(segments))]

    def strided(self, segments: Sequence[Segment]) -> list[list[Tensor]]:
        """Per segment, ``[slots, hidden]`` states after the embeddings and each layer of the encoder."""
        reader, body = self.base_reader, self.encoder.decoder
        made = dict[int, list[Tensor]]()
        read = [[*s.front, *s.ids] for s in segments]
        for which in pack(list(map(len, read)), self.batch_positions, pass_positions(reader.device)):
            ids = pad_rows([read[i] for i in which])[0].to(reader.device)
            embeds = reader.embed(ids)
            positions = torch.arange(ids.shape[1], device=ids.device).expand(len(which), -1)
            options: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
            mask = torch.ones_like(ids)
            out = body(
                inputs_embeds=embeds, attention_mask=mask, **options, **position_arguments(body, positions)
            ).hidden_states
            for row, i in enumerate(which):
                segment = segments[i]
                runs = torch.bincount(slot_of_token([len(segment.ids)], [segment.slots]))
                ends = (runs.cumsum(0) - 1 + len(segment.front)).to(ids.device)
                made[i] = [embeds[row, ends], *(layer[row, ends] for layer in out[1:])]
        return [made[i] for i in range(len(segments))]
