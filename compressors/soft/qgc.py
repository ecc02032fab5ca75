"""QGC: the question weighs the tokens of every window; pooled windows, reviewed by more layers, are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.layer_stack import LayerStack
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.pooling import softmax_in_windows
from ..slots.projector import matching_factor
from ..slots.question import QuerySettings
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings, room_for_tokens, slot_of_token


@dataclass
class QGCConfig(SegmentSettings, QuerySettings, CompressorConfig):
    """Settings of QGC."""

    method: ClassVar[str] = "qgc"
    title: ClassVar[str] = "QGC"
    cost: ClassVar[str] = "states"

    segment_tokens: int = setting(512, "longest segment (the paper's longest document)", kw_only=True)
    query_aware: bool = setting(True, "read the question before the passage and pool by it", kw_only=True)
    layers: int = setting(2, "layers before pooling, and as many to review afterwards")

    def __post_init__(self) -> None:
        check_counts(self, {"layers": 1, "segment_tokens": 1})
        self.check_segments()
        self.check_query()


@register_compressor
class QGCCompressor(SegmentCompressor):
    r"""Query-guided compressor (QGC, arXiv 2406.02376).

    Copies of the reader's first layers, without a causal mask, read ``[BOS][question][segment]``. In several heads, with the
    mean q of the question's states, keys :math:`W_k h_t` and values :math:`h_t` (all after an RMSNorm), a window is pooled to
    :math:`\sum_t \mathrm{softmax}_{t \in window}(W_q q \cdot W_k h_t / \sqrt{d}) \, h_t`. Copies of the next layers read
    ``[BOS][question][segment][pooled windows]``. Their output at the pooled windows, through one linear layer, are the slots.
    The reader stays as it is.

    Beyond the paper: heads and layers are the reader's own; windows differ by at most one token; a passage without a question
    is pooled by the mean state of what stands before it. The paper gives passages of lower rank longer windows: ask for a
    ratio per passage, as the adapters' policy ``ScoreBudget`` does. It also hides half of the question's tokens from the
    reader in training; this trainer does not.

    Attributes:
        encoder, review: the `LayerStack` before pooling and the one after it.
        query_norm, key_norm, query, key: the pooling.
        linear: ``[n, hidden] -> [n, width]``.

    Raises:
        ValueError: if the reader has fewer than ``2 * layers`` layers.
    """

    config_class = QGCConfig
    interface: ClassVar[Interface] = "embeds"
    config: QGCConfig

    def __init__(self, config: QGCConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LayerStack(reader.model, 0, config.layers, norm=False, bidirectional=True)
        self.review = LayerStack(reader.model, config.layers, 2 * config.layers, bidirectional=True)
        heads, size = reader.model.config.get_text_config().num_attention_heads, reader.width
        self.heads = heads if size % heads == 0 else 1
        self.query_norm, self.key_norm = (nn.RMSNorm(size, eps=1e-6) for _ in range(2))
        self.query, self.key = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.linear: nn.Linear | None = None
        self.to(reader.device)
        with torch.no_grad():
            (found,) = self.encode_segments([probe(reader.vocab_size, self.longest_segment(None), 4, self.opening)])
            self.linear = nn.Linear(found.shape[1], reader.width, device=reader.device)
            nn.init.zeros_(self.linear.bias)
            self.linear.weight.copy_(matching_factor(found, reader) * torch.eye(reader.width, found.shape[1]))

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """Tokens that fit twice: themselves, and as many pooled windows at most."""
        room = room_for_tokens(self.max_positions, self.base_reader.name, len(self.opening), question_tokens)
        return min(self.config.segment_tokens, self.config.segment_tokens if room is None else max(room // 2, 1))

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Reviewed windows, in batches of similar length."""
        made, device = dict[int, Tensor](), self.base_reader.device
        lengths = [len(s.front) + len(s.ids) + s.slots for s in segments]
        for which in pack(lengths, self.batch_positions, pass_positions(device)):
            made |= dict(zip(which, self._reviewed([segments[i] for i in which])))
        return [made[i] for i in range(len(segments))]

    def _reviewed(self, segments: Sequence[Segment]) -> list[Tensor]:
        """``[slots, width]`` per segment of one batch."""
        reader, fronts = self.base_reader, [len(s.front) for s in segments]
        ids, real = (t.to(reader.device) for t in pad_rows([[*s.front, *s.ids] for s in segments]))
        with torch.no_grad():
            embeds = reader.embed(ids)
        states = self.encoder(embeds, real)
        pooled = self.pool(states, segments).to(states.dtype).split([s.slots for s in segments])
        rows = [
            torch.cat([row[: front + len(s.ids)], windows])
            for row, front, s, windows in zip(states, fronts, segments, pooled)
        ]
        mask = pad_sequence([torch.ones(len(row), device=row.device) for row in rows], batch_first=True)
        found = self.review(pad_sequence(rows, batch_first=True), mask)
        kept = [found[i, len(row) - s.slots : len(row)] for i, (row, s) in enumerate(zip(rows, segments))]
        return kept if self.linear is None else [self.linear(row.to(self.linear.weight)) for row in kept]

    def pool(self, states: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``[all slots, hidden]`` from ``[batch, time, hidden]`` states of ``[front][segment]``."""
        weight, device, skipped = self.query.weight, states.device, len(self.opening)
        states, time = states.to(weight), torch.arange(states.shape[1], device=states.device)
        front = torch.tensor([len(s.front) for s in segments], device=device)[:, None]
        end = front + torch.tensor([len(s.ids) for s in segments], device=device)[:, None]
        asks = (time < front) & ((time >= skipped) | (front == skipped))
        mean = (states * asks[..., None]).sum(1) / asks.sum(1, keepdim=True).clamp(min=1)
        row, column = ((time >= front) & (time < end)).nonzero(as_tuple=True)
        values = self.key_norm(states[row, column])
        slots = [s.slots for s in segments]
        where = slot_of_token([len(s.ids) for s in segments], slots).to(device)
        query = self.query(self.query_norm(mean)).unflatten(-1, (self.heads, -1))[row]
        key = self.key(values).unflatten(-1, (self.heads, -1))
        weights = softmax_in_windows((query * key).sum(-1) / key.shape[-1] ** 0.5, where, sum(slots))
        weighed = values.unflatten(-1, (self.heads, -1)) * weights[..., None]
        return weighed.new_zeros(sum(slots), *weighed.shape[1:]).index_add(0, where, weighed).flatten(1)
