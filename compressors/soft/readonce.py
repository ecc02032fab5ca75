"""ReadOnce: the lower half of the reader reads a passage; means of its states over windows, projected, are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.passage import Interface
from ..encoders.layer_stack import LayerStack
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import passage_states
from ..slots.projector import matching_factor
from ..slots.segments import window_lengths


@dataclass
class ReadOnceConfig(ReaderTuningSettings, CompressorConfig):
    """Settings of ReadOnce."""

    method: ClassVar[str] = "readonce"
    title: ClassVar[str] = "ReadOnce"
    cost: ClassVar[str] = "states"

    ratio: float = setting(8.0, "tokens per window, if no ratio is asked for")
    layers: int | None = setting(None, "first layers of the reader that encode; default: half of them, as in the paper")
    chunk_tokens: int = setting(512, "longest stretch that the encoder reads at once")

    def __post_init__(self) -> None:
        check_counts(self, {"layers": 1, "chunk_tokens": 1}, optional=("layers",))
        check_ratio(self.ratio, "tokens per window")
        self.check_reader_tuning()


@register_compressor
class ReadOnceCompressor(SoftCompressor):
    r"""ReadOnce Transformers (arXiv 2010.12854): a representation of a document that any later task reads.

    Copies of the reader's first layers read a passage. With their states h after the final norm and windows of ``ratio``
    tokens, :math:`slot_k = W \frac{1}{|window_k|} \sum_{t \in window_k} h_t + b`. Nothing depends on the ratio.

    A decoder-only reader changes the interface: the paper's BART takes the representation in the middle of its encoder, beside
    the question's states, and its decoder attends to both. Here the slots enter the reader as embeddings, at its first layer.
    The encoder is causal, so a token's state depends on what comes before it. The paper tunes the upper layers on the task;
    ``tune_reader`` does it with LoRA. W starts as the factor that brings slots to the norm of the reader's embeddings.

    Attributes:
        encoder: the `LayerStack` of the first layers.
        linear: W and b, ``[n, hidden] -> [n, width]``.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
        batch_positions: positions per forward pass of the encoder (memory vs. speed; the result does not change).

    Raises:
        ValueError: if the reader has fewer layers.
    """

    config_class = ReadOnceConfig
    interface: ClassVar[Interface] = "embeds"
    config: ReadOnceConfig

    def __init__(self, config: ReadOnceConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        half = -(-reader.model.config.get_text_config().num_hidden_layers // 2)
        self.encoder = LayerStack(reader.model, 0, config.layers or half)
        with torch.no_grad():
            found = self.states([torch.linspace(0, reader.vocab_size - 1, 32).long().tolist()])
            self.linear = nn.Linear(found.shape[1], reader.width, device=reader.device)
            nn.init.zeros_(self.linear.bias)
            self.linear.weight.copy_(matching_factor(found, reader) * torch.eye(reader.width, found.shape[1]))
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[str]:
        """The base reader."""
        return [self.base_reader.fingerprint]

    def states(self, ids: Sequence[list[int]]) -> Tensor:
        """``[all tokens, hidden]``: what is averaged."""
        chunk, budget = self.config.chunk_tokens, self.batch_positions
        return passage_states(self.base_reader, self.encoder, ids, [[]] * len(ids), chunk, budget)

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """The projected mean of each window."""
        reader, weight = self.base_reader, self.linear.weight
        lengths = [window_lengths(len(ids), ratio or 1.0) for ids in passages.ids]
        windows = torch.tensor([n for passage in lengths for n in passage], dtype=torch.long)
        if not len(windows):
            return [torch.zeros(0, reader.width)] * len(lengths)
        states = self.states(passages.ids).to(weight)
        where = torch.repeat_interleave(torch.arange(len(windows)), windows).to(weight.device)
        total = states.new_zeros(len(windows), states.shape[1]).index_add(0, where, states)
        return self.linear(total / windows.to(weight)[:, None]).split([len(passage) for passage in lengths])
