"""Slot-wise autoencoding: a small decoder, thrown away after training, reads each slot's own tokens from the slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.batching import pad_rows
from ..core.hidden import hide
from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..slots.segments import slot_of_token
from .language_modeling import TokenLoss
from .registry import Objective, Scored, Setup, register_objective


@register_objective("slot_ae")
class SlotAutoencodingLoss(nn.Module, Objective):
    r"""Fine-grained autoencoding (Deng et al., arXiv 2412.17483, section 5.1).

    The r tokens :math:`x_1 \dots x_r` that a slot z stands for are predicted from the slot alone, by a decoder D of one
    transformer block that reads ``[z][ae][x_1 ... x_r]``:

    .. math:: L = -\sum_z \sum_j \log p_D(x_j \mid z, x_{<j})

    Each slot thus gets a gradient of its own, where ``ae`` trains all of a passage together. The block, the vector [ae] and
    the matrices into the block train with the compressor; they are not part of it. Logits come from the reader's own head.

    The paper's decoder reads the slot's keys and values. Here D reads one row per slot: the slot itself, or the values of all
    layers of a KV slot, both through a learned matrix.

    Memory: as `TokenLoss`, and the block's activations, ``[slots, tokens per slot + 2, hidden]``.

    Args:
        reader: source of embeddings and head.
        size: width of a slot's row, see `slot_rows`.
        chunk: rows whose logits exist at the same time.
    """

    targets = frozenset({"slots"})
    trains = True
    reader: Reader

    def __init__(self, reader: Reader, size: int, chunk: int = 512) -> None:
        super().__init__()
        hide(self, "reader", reader)
        config = reader.model.config.get_text_config()
        hidden, heads = reader.model.get_output_embeddings().weight.shape[1], config.num_attention_heads
        self.slot = nn.Linear(size, hidden, bias=False)
        self.tokens = nn.Linear(reader.width, hidden, bias=False)
        self.ae = nn.Parameter(torch.randn(hidden) * hidden**-0.5)
        heads = heads if hidden % heads == 0 else 1
        options: Any = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.block = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.loss = TokenLoss(reader.head, chunk)
        self.to(reader.device)

    @classmethod
    def create(cls, setup: Setup) -> Self:
        with torch.no_grad():
            (sample,) = setup.compressor.encode(["one two three four"])
        return cls(setup.compressor.base_reader, slot_rows(sample).shape[1])

    def total(self, scored: Scored) -> Tensor:
        return self(scored.passages, scored.targets)

    def forward(self, passages: Sequence[CompressedPassage], ids: Sequence[Sequence[int]]) -> Tensor:
        """The loss summed over tokens.

        Args:
            passages: of interface ``embeds`` or dense ``kv``, differentiable.
            ids: token ids of each passage, which its slots share evenly.
        """
        read = [(p, list(tokens)) for p, tokens in zip(passages, ids, strict=True) if p.slots]
        if not read:
            return self.ae.sum() * 0.0
        rows = torch.cat([slot_rows(p) for p, _ in read]).to(self.ae)
        owner = slot_of_token([len(tokens) for _, tokens in read], [p.slots for p, _ in read])
        flat = torch.tensor([i for _, tokens in read for i in tokens])
        runs, real = pad_rows([run.tolist() for run in flat.split(torch.bincount(owner, minlength=len(rows)).tolist())])
        hidden = self.decode(rows, runs.to(rows.device))
        keep = real.bool().to(rows.device)
        return self.loss(hidden[keep], runs.to(rows.device)[keep], num_items=1)

    def decode(self, rows: Tensor, ids: Tensor) -> Tensor:
        """``[slots, r, hidden]`` states that predict ``[slots, r]`` ids, from ``[slots, size]`` rows."""
        with torch.no_grad():
            tokens = self.reader.embed(ids).to(rows.dtype)
        first = torch.stack([self.slot(rows), self.ae.expand(len(rows), -1)], dim=1)
        read = torch.cat([first, self.tokens(tokens[:, :-1])], dim=1)
        read = read + sinusoids(read.shape[1], read.shape[2], read)
        mask = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool, device=read.device).triu(1)
        return self.norm(self.block(read, src_mask=mask))[:, 1:]


def slot_rows(passage: CompressedPassage) -> Tensor:
    """``[slots, size]``: the slots, or of a dense KV passage the values of all layers and heads.

    Raises:
        ValueError: for text and ragged KV passages.
    """
    if passage.embeds is not None:
        return passage.embeds
    if passage.ragged or not passage.values:
        kind = "ragged KV passages" if passage.ragged else repr(passage.interface)
        raise ValueError(f"The objective slot_ae needs one row per slot, got {kind}; remove it from the recipe.")
    return torch.cat([value.transpose(0, 1).flatten(1) for value in passage.values], dim=-1)


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """``[length, width]`` sinusoidal positions (arXiv 1706.03762, section 3.5), sines first."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(like.dtype)
