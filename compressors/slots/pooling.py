"""Pooled embeddings: runs of neighbouring tokens, each summed into one vector under a learned gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reader.reader import Reader
from .nested import NestedSlot
from .segments import tokens_of_slots

_LIMIT = 8.0  # of a gate's logarithm: far enough to silence a token, never enough to overflow


class GatedPool(nn.Module):
    r"""The vector of a run of tokens t: :math:`s \sum_t w_t E_t / \sqrt{\sum_t w_t^2}` with :math:`w_t = e^{g \cdot E_t}`.

    E are the reader's embeddings (at root-mean-square 1 inside the gate), s and g are learned. It starts at g = 0, the plain
    sum over the square root of the length, and learns which tokens to let through: the rare ones, as a search index would.

    Args:
        reader: the reader whose embeddings are pooled.

    Attributes:
        scale: s. gate: g, ``[1, width]``.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._held = (reader,)
        self.scale = nn.Parameter(torch.ones((), device=reader.device))
        self.gate = nn.Parameter(torch.zeros(1, reader.width, device=reader.device))

    def forward(
        self,
        pieces: Sequence[list[int]],
        slots: Sequence[int],
        nests: Sequence[Sequence[NestedSlot] | None] | None = None,
    ) -> Tensor:
        """``[all slots, width]`` in at least float32.

        Each piece of token ids is cut into as many even runs as it has slots, or pooled over its nested slots' windows.
        """
        (reader,) = self._held
        which, where = tokens_of_slots([len(piece) for piece in pieces], slots, nests)
        where, count = where.to(reader.device), sum(slots)
        with torch.no_grad():
            tokens = reader.embed(torch.tensor([i for piece in pieces for i in piece])[which].to(reader.device))
            tokens = tokens.to(torch.promote_types(self.gate.dtype, torch.float32))
            unit = tokens * (tokens.shape[1] ** 0.5 / reader.embedding_norm)
        strength = (unit * self.gate).sum(-1)  # not a matrix product, which autocast would take to bfloat16
        weight = torch.exp(_LIMIT * torch.tanh(strength / _LIMIT))
        total = tokens.new_zeros(count, tokens.shape[1]).index_add(0, where, tokens * weight[:, None])
        size = tokens.new_zeros(count).index_add(0, where, weight.square()).sqrt()
        return self.scale * total / size[:, None]
