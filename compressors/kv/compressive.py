"""Compressive memory: a convolution over a passage's own keys and values, trained to keep what attention to them gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import pack, pass_positions
from ..core.config import CompressorConfig, check_counts, setting
from ..reader.kv import ROTARY
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.segments import Segment, SegmentSettings, slot_of_token
from .probing import Evidence, read, write_probes
from .ragged import RaggedSegmentCompressor, RaggedSlots
from .selection import unrotated

PROBES = 16  # rule-made questions per document whose attention is to be kept


@dataclass
class CompressiveConfig(SegmentSettings, CompressorConfig):
    """Settings of compressive memory."""

    method: ClassVar[str] = "compressive"
    title: ClassVar[str] = "compressive memory"
    cost: ClassVar[str] = "states"

    segment_tokens: int = setting(1024, "longest segment", kw_only=True)
    kernel: int = setting(4, "taps of the convolution; a run of more or fewer tokens is stretched to them")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "kernel": 1})
        self.check_segments()


@register_compressor
class CompressiveCompressor(RaggedSegmentCompressor):
    r"""Compressive memory with attention reconstruction (Compressive Transformer, arXiv 1911.05507) on keys and values.

    The reader reads ``[BOS][segment]``. In each head of each layer, a run of L tokens becomes one pair: with the keys x before
    their rotation, or the values, and W the matrices of the convolution's kernel,
    :math:`z = \frac{kernel}{L} \sum_{t < L} W_{\lfloor t \cdot kernel / L \rfloor}\, x_t`. It stands in the middle of its
    run, with :math:`\log L` added to its attention scores, as it takes the place of L pairs. The kernel starts as the mean.

    The objective ``attention`` reads documents with rule-made questions and takes the squared difference between the questions'
    attention outputs over all pairs and over the compressed ones, per layer, as a share of the former's square. No other
    part of the reader gets a gradient or is run.

    Differences from the paper: keys and values of a frozen reader instead of hidden states of a model in training; the
    bias; the share, so that layers count alike; any ratio with one kernel.

    Attributes:
        key_kernel, value_kernel: ``[layers, kv_heads, kernel, head_dim, head_dim]``.
    """

    config_class = CompressiveConfig
    config: CompressiveConfig

    def __init__(self, config: CompressiveConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        heads, *widths = self.slot_shapes[0]
        shape = len(self.slot_shapes), heads, config.kernel
        kernels = [torch.eye(n, device=reader.device).expand(*shape, n, n) / config.kernel for n in widths]
        self.key_kernel, self.value_kernel = (nn.Parameter(kernel.clone()) for kernel in kernels)

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or half of the reader's positions: the questions of training are read after a segment."""
        most, limit = super().longest_segment(ratio), self.max_positions
        return most if limit is None else max(min(most, limit // 2), 1)

    def encode_segments(self, segments: list[Segment]) -> list[RaggedSlots]:
        """One pair for each run."""
        reader, made = self.base_reader, dict[int, RaggedSlots]()
        sizes = [len(segment.front) + len(segment.ids) for segment in segments]
        for which in pack(sizes, self.batch_positions, pass_positions(reader.device)):
            with torch.no_grad():
                evidence = read(reader, [segments[i].ids for i in which], [[] for _ in which])
            for row, i in enumerate(which):
                made[i] = self.pooled(evidence, row, len(segments[i].ids), segments[i].slots)
        return [made[i] for i in range(len(segments))]

    def pooled(self, evidence: Evidence, row: int, length: int, slots: int) -> RaggedSlots:
        """The pairs of one row of the evidence, differentiable in the kernels."""
        placement, kernel, device = self.base_reader.kv_placement, self.config.kernel, self.key_kernel.device
        owner = slot_of_token([length], [slots])
        runs = torch.bincount(owner)
        first = runs.cumsum(0) - runs
        tap = (torch.arange(length) - first[owner]) * kernel // runs[owner]
        share = torch.zeros(slots * kernel, length)
        share[owner * kernel + tap, torch.arange(length)] = kernel / runs[owner].float()
        at, share = first + (runs - 1) // 2 + evidence.start, share.to(device, self.key_kernel.dtype)
        keys, values = [], []
        for number, layer in enumerate(evidence.layers):
            plain = unrotated(layer.keys[row : row + 1], evidence, placement, number)[0, :, :length]
            key, value = (
                torch.einsum("hskd,hkde->hse", (share @ x.to(share)).unflatten(1, (slots, kernel)), weights[number])
                for x, weights in (
                    (plain, self.key_kernel),
                    (layer.values[row, :, :length], self.value_kernel),
                )
            )
            keys.append(placement.rotate(key, at.to(device), number) if placement.kinds[number] == ROTARY else key)
            values.append(value)
        return RaggedSlots(tuple(keys), tuple(values), at, runs.to(device).log(), length)

    @classmethod
    def own_objectives(cls) -> dict[str, Callable[..., tuple[Tensor, int]]]:
        """``attention``: attention reconstruction."""
        return {"attention": cls.attention_reconstruction}

    def attention_reconstruction(
        self, texts: Sequence[str], rng: random.Random, ratio: float | None
    ) -> tuple[Tensor, int]:
        """The loss on documents, times their tokens, and the number of tokens."""
        reader, total, tokens = self.base_reader, torch.zeros((), device=self.key_kernel.device), 0
        for ids in reader.tokenize_batch(list(texts)):
            for length, slots in self.segments(len(ids), ratio):
                part, ids = ids[:length], ids[length:]
                room = None if self.max_positions is None else self.max_positions - len(self.opening) - length
                if room is not None and room < PROBES:
                    continue
                asked = write_probes(reader, reader.decode(part), "questions", PROBES, None, room)
                with torch.no_grad():
                    evidence = read(reader, [part], [[probe[:room] for probe in asked]])
                total = total + length * self.difference(evidence, self.pooled(evidence, 0, length, slots))
                tokens += length
        return total, tokens

    def difference(self, evidence: Evidence, slots: RaggedSlots) -> Tensor:
        """Mean over layers of the squared difference of attention outputs, as a share of their square."""
        found = []
        for layer, keys, values in zip(evidence.layers, slots.keys, slots.values):
            groups, queries = layer.queries.shape[1] // len(keys), layer.queries[0].to(keys)
            outputs = []
            for k, v, bias in ((layer.keys[0], layer.values[0], None), (keys, values, slots.bias)):
                scores = queries @ k.to(keys).repeat_interleave(groups, 0).mT * layer.scaling
                if layer.softcap is not None:
                    scores = layer.softcap * (scores / layer.softcap).tanh()
                outputs.append(
                    (scores if bias is None else scores + bias).softmax(-1) @ v.to(keys).repeat_interleave(groups, 0)
                )
            found.append((outputs[0] - outputs[1]).square().mean() / outputs[0].square().mean().clamp(min=1e-12))
        return torch.stack(found).mean()
