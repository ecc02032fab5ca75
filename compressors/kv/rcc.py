"""RCC: the reader runs over slots to which every layer adds the encoder's states; their keys and values are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, pack, pad_rows, pass_positions, soft_batches
from ..core.config import CompressorConfig, added, check_counts, setting
from ..core.hidden import hide
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin, Twin, share
from ..encoders.pooled_queries import cut_layers
from ..encoders.small_lm import SmallLMEncoder
from ..reader.kv import layer_list
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.projector import matching_factor
from ..slots.segments import OwnEncoder, Segment, SegmentSettings, SlotPerToken, slot_of_token
from .encode import KVSlots, adding, cached_layers, outputs
from .memory_slots import KVSegmentCompressor


@dataclass
class RCCConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of RCC."""

    method: ClassVar[str] = "rcc"
    title: ClassVar[str] = "RCC"

    ratio: float | None = setting(8.0, "tokens per slot if no ratio is asked for (the paper: 32)", kw_only=True)
    segment_tokens: int = setting(512, "longest segment (the paper: windows of 2,048)", kw_only=True)
    encoder: str = added(
        "lora",
        "'lora': the reader plus LoRA; else the id or folder of a causal LM or a state-space model, trained whole",
    )

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1})
        self.check_segments()
        self.check_lora()


@register_compressor
class RCCCompressor(OwnEncoder, SlotPerToken, KVSegmentCompressor):
    r"""Recurrent context compression (RCC, arXiv 2406.06110).

    The encoder reads ``[BOS][segment]``: the reader plus LoRA, or a model of its own, such as Mamba. At the last token of each
    run of ``ratio`` tokens its states are kept: :math:`h^0` (the token's embedding) and those after its layers. The reader of N
    layers then runs over ``[BOS][slots]``: a slot enters as :math:`E h^0`, and after layer i :math:`A_i h^{m(i)}` is added to
    it. With LoRA :math:`m(i) = i`; for an encoder of M layers :math:`m(i) = \max(\lfloor i M / N \rfloor, 1)`. The keys and
    values of the slots are the compressed segment.

    Differences from the paper: there the sums are formed while the reader answers, with the slots of all windows in one prompt;
    here once, when the passage is compressed. Slots of different segments do not see each other. The reader stays as it is.
    Short passages are not tiled to a whole window. The :math:`A_i` start at zero; E starts as the identity, or for another
    encoder as random numbers that bring slots to the norm of the reader's embeddings.

    Args:
        encoder_model: a `SmallLMEncoder`, instead of loading ``config.encoder``.

    Attributes:
        encoder: a `LoRATwin` of the reader, or a `SmallLMEncoder`; without the layers after :math:`m(N - 1)`.
        first: E, ``[width, encoder width]``.
        added: :math:`A_1 \dots A_{N-1}`, ``[hidden, encoder hidden]`` each.

    Raises:
        ValueError: if the reader's keys cannot move, or reader or encoder have too few layers.
    """

    config_class = RCCConfig
    config: RCCConfig
    runs: Any

    def __init__(self, config: RCCConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None) -> None:
        super().__init__(config, reader)
        hide(self, "runs", share(reader.model))
        layers = len(layer_list(self.runs.get_decoder())[1])
        self.taken = list(range(1, layers))  # m(i)
        self.encoder: Twin
        if config.encoder == "lora":
            model = share(reader.model)
            cut_layers(model.get_decoder(), 1)
            self.encoder = LoRATwin(model, **config.lora)
        else:
            self.encoder = self.make_encoder(config, encoder_model)
            own = len(layer_list(self.encoder.decoder)[1])
            self.taken = [max(i * own // layers, 1) for i in self.taken]
            cut_layers(self.encoder.decoder, own - self.taken[-1])
        with torch.no_grad():
            (found,) = self.strided([probe(self.source.vocab_size, 32, 32, self.opening)])
        hidden = reader.model.get_decoder().config.get_text_config().hidden_size
        self.first = nn.Linear(found[0].shape[1], reader.width, bias=False, device=reader.device)
        self.added = nn.ModuleList(nn.Linear(h.shape[1], hidden, bias=False) for h in found[1:])
        with torch.no_grad():
            if config.encoder == "lora":
                nn.init.eye_(self.first.weight)
            else:
                self.first.weight *= matching_factor(self.first(found[0].float()), reader)
            for parameter in self.added.parameters():
                nn.init.zeros_(parameter)
        self.to(reader.device)

    @property
    def max_positions(self) -> int | None:
        """Positions of reader and encoder; slots take none of the encoder's."""
        return min((n for n in (super().max_positions, self.source.max_positions) if n is not None), default=None)

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the slots."""
        reader, body = self.base_reader, self.runs.get_decoder()
        states = self.strided(segments)
        rows = [self.first(row[0].to(self.first.weight)) for row in states]
        sequences = [SoftSequence.with_memory(reader.bos_ids, row) for row in rows]
        made: dict[int, KVSlots] = {}
        for batch in soft_batches(sequences, reader.embed, reader.device, budget=self.batch_positions):
            width = batch.embeds.shape[1]
            sums = []
            for number, matrix in enumerate(self.added, 1):
                found = [matrix(states[i][number].to(matrix.weight)) for i in batch.which]  # type: ignore[arg-type]
                padded = [
                    nn.functional.pad(row, (0, 0, n - len(row), width - n)) for row, n in zip(found, batch.lengths)
                ]
                sums.append(torch.stack(padded).to(batch.embeds.dtype))
            with adding(layer_list(body)[1], sums):
                layers = cached_layers(body, batch.embeds, batch.mask, batch.positions)
            for row, i in enumerate(batch.which):
                made[i] = KVSlots.at(layers, batch.positions, row, sequences[i].places)
        return [made[i] for i in range(len(segments))]

    def strided(self, segments: Sequence[Segment]) -> list[list[Tensor]]:
        """Per segment, ``[slots, hidden]``: embeddings, then states after the encoder's layers :math:`m(i)`."""
        device, layers = self.base_reader.device, layer_list(self.encoder.decoder)[1]
        made = dict[int, list[Tensor]]()
        read = [[*s.front, *s.ids] for s in segments]
        for which in pack(list(map(len, read)), self.batch_positions, pass_positions(device)):
            ids = pad_rows([read[i] for i in which])[0].to(device)
            embeds = self.source.embed(ids)
            with outputs(layers) as states:
                self.encoder(embeds, torch.ones_like(ids))
            for row, i in enumerate(which):
                runs = torch.bincount(slot_of_token([len(segments[i].ids)], [segments[i].slots]))
                ends = (runs.cumsum(0) - 1 + len(segments[i].front)).to(device)
                made[i] = [embeds[row, ends], *(states[m - 1][row, ends] for m in self.taken)]
        return [made[i] for i in range(len(segments))]
