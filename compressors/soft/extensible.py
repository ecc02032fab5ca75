"""Extensible Tokenization: the first layers of the reader read a passage; every k-th state is a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.passage import Interface
from ..encoders.layer_stack import LayerStack
from ..objectives.two_stream import two_stream_losses
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import passage_states
from ..slots.projector import check_width, learned_scale, matching_factor, scaled
from ..slots.segments import window_lengths


@dataclass
class ExtensibleConfig(CompressorConfig):
    """Settings of Extensible Tokenization."""

    method: ClassVar[str] = "extensible"
    title: ClassVar[str] = "Extensible Tokenization"
    cost: ClassVar[str] = "states"

    ratio: float = setting(4.0, "tokens per slot, if no ratio is asked for")
    layers: int = setting(8, "first layers of the reader that encode (the paper)")
    chunk_tokens: int = setting(1024, "longest stretch that the encoder reads at once (the paper: 4,096)")
    stream_tokens: int = setting(64, "tokens per chunk of the objective two_stream (the paper: 512)")

    def __post_init__(self) -> None:
        check_counts(self, {"layers": 1, "chunk_tokens": 1, "stream_tokens": 1})
        check_ratio(self.ratio, "tokens per slot")


@register_compressor
class ExtensibleCompressor(SoftCompressor):
    """Extensible Tokenization (arXiv 2401.07793).

    Copies of the reader's first layers read a passage. Their output, after the final norm, at the last token of every window
    of ``ratio`` tokens is a slot; the last window may be shorter. The reader stays as it is, and nothing depends on the ratio:
    one checkpoint serves every ratio (train it on random ones).

    Training: the objective ``two_stream`` (`two_stream_losses`), the paper's only one, beside those on the slots.

    Beyond the paper: a learned factor, which starts where slots have the norm of the reader's embeddings. The final norm is
    the reader's, and is not trained.

    Attributes:
        encoder: the `LayerStack` of the first layers.
        log_scale: logarithm of the output factor.
        batch_positions: positions per forward pass of the encoder (memory vs. speed; the result does not change).

    Raises:
        ValueError: if the reader has fewer layers, or its hidden states and embeddings differ in width.
    """

    config_class = ExtensibleConfig
    interface: ClassVar[Interface] = "embeds"
    config: ExtensibleConfig

    def __init__(self, config: ExtensibleConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self.encoder = LayerStack(reader.model, 0, config.layers)
        with torch.no_grad():
            sample = torch.linspace(0, reader.vocab_size - 1, 32).long().tolist()
            found = self.states([sample])
        check_width(found, reader)
        self.log_scale = learned_scale(matching_factor(found, reader), reader)

    @classmethod
    def own_objectives(cls) -> dict[str, Callable[..., tuple[Tensor, int]]]:
        """``two_stream``: predict each chunk of a document from the slots before it."""
        return {"two_stream": two_stream_losses}

    def states(self, ids: Sequence[list[int]]) -> Tensor:
        """``[all tokens, width]``: what slots are taken from."""
        chunk, budget = self.config.chunk_tokens, self.batch_positions
        return passage_states(self.base_reader, self.encoder, ids, [[]] * len(ids), chunk, budget)

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """The state at the last token of each window."""
        reader = self.base_reader
        lengths = [window_lengths(len(ids), ratio or 1.0) for ids in passages.ids]
        windows = [n for passage in lengths for n in passage]
        if not windows:
            return [torch.zeros(0, reader.width)] * len(lengths)
        last = torch.tensor(windows).cumsum(0) - 1
        slots = scaled(self.states(passages.ids)[last], self.log_scale)
        return slots.split([len(passage) for passage in lengths])
