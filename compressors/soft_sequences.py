"""What an encoder reads: token ids with embeddings in some of their places, laid out in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import pack, pass_positions


@dataclass
class SoftSequence:
    """Token ids, and embeddings that are read in the places of some of them.

    Attributes:
        ids: token ids, BOS included; the ids at ``places`` are not read.
        places: indices into ``ids``.
        rows: ``[places, width]`` embeddings, of any dtype and on any device.
        positions: ``[len(ids)]`` position ids; default: 0, 1, 2, ...
    """

    ids: Sequence[int]
    places: Sequence[int]
    rows: Tensor
    positions: Tensor | None = None

    @classmethod
    def with_memory(cls, text: Sequence[int], memory: Tensor, positions: Tensor | None = None) -> SoftSequence:
        """``[text][memory tokens]``.

        Args:
            text: token ids, at positions 0, 1, 2, ...
            memory: ``[slots, width]`` embeddings of the memory tokens.
            positions: ``[slots]`` their position ids; default: they count on after the text.
        """
        slots, length = len(memory), len(text)
        if positions is not None:
            positions = torch.cat([torch.arange(length), positions])
        return cls([*text, *[0] * slots], range(length, length + slots), memory, positions)


@dataclass
class SoftBatch:
    """Some of many sequences, padded on the right.

    Attributes:
        which: the index of each row's sequence.
        lengths: the length of each row, padding left out.
        embeds: ``[batch, time, width]``, differentiable in the sequences' embeddings.
        mask: ``[batch, time]``, ones: nothing of a causal model looks at padding on the right, and without a mask
            attention is faster.
        positions: ``[batch, time]``.
    """

    which: list[int]
    lengths: list[int]
    embeds: Tensor
    mask: Tensor
    positions: Tensor

    def unpadded(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each sequence's index and its own part ``[length, hidden]`` of hidden states ``[batch, time, hidden]``."""
        for i, n, row in zip(self.which, self.lengths, hidden):
            yield i, row[:n]


def soft_batches(
    sequences: Sequence[SoftSequence], embed: Callable[[Tensor], Tensor], device: torch.device, *, budget: int
) -> Iterator[SoftBatch]:
    """Every sequence once, the longest first.

    Args:
        sequences: what is to be read.
        embed: ``[batch, time]`` token ids to embeddings.
        device: where ``embed`` takes its ids.
        budget: positions that a batch may take, padding counted (or of one sequence).
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    for which in pack(lengths, budget, pass_positions(device)):
        longest = lengths[which[0]]
        ids = torch.zeros(len(which), longest, dtype=torch.long)
        positions = torch.arange(longest).repeat(len(which), 1)
        rows: list[int] = []
        columns: list[int] = []
        for row, i in enumerate(which):
            sequence, n = sequences[i], lengths[i]
            ids[row, :n] = torch.tensor(sequence.ids, dtype=torch.long)
            if sequence.positions is not None:
                positions[row, :n] = sequence.positions
            rows += [row] * len(sequence.places)
            columns += sequence.places
        tokens = embed(ids.to(device))
        source = torch.cat([sequences[i].rows.to(tokens.device, tokens.dtype) for i in which])
        # Indices on the CPU serve tensors on any device.
        where = (torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long))
        embeds = tokens.index_put(where, source)
        yield SoftBatch(
            which, [lengths[i] for i in which], embeds, torch.ones_like(ids, device=device), positions.to(device)
        )
