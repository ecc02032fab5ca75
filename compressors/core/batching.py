"""Batches of sequences of similar length, and sequences that mix token ids and embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SoftSequence:
    """Token ids, with embeddings instead of some of them.

    Attributes:
        ids: token ids, including BOS; those at ``places`` are ignored.
        places: indices into ``ids``.
        rows: ``[places, width]`` embeddings, any dtype and device.
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
            positions: ``[slots]`` their position ids; default: count on after the text.
        """
        slots, length = len(memory), len(text)
        if positions is not None:
            positions = torch.cat([torch.arange(length), positions])
        return cls([*text, *[0] * slots], range(length, length + slots), memory, positions)


@dataclass
class SoftBatch:
    """A batch of sequences, padded on the right.

    Attributes:
        which: the index of each row's sequence.
        lengths: the length of each row, without padding.
        embeds: ``[batch, time, width]``, differentiable in the sequences' embeddings.
        mask: ``[batch, time]``, ones: a causal model never attends to padding on the right, and without a mask
            attention is faster.
        positions: ``[batch, time]``.
    """

    which: list[int]
    lengths: list[int]
    embeds: Tensor
    mask: Tensor
    positions: Tensor

    def unpadded(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each sequence's index and its part ``[length, hidden]`` of hidden states ``[batch, time, hidden]``."""
        for i, n, row in zip(self.which, self.lengths, hidden):
            yield i, row[:n]


def soft_batches(
    sequences: Sequence[SoftSequence], embed: Callable[[Tensor], Tensor], device: torch.device, *, budget: int
) -> Iterator[SoftBatch]:
    """Batches of all sequences, the longest first.

    Args:
        sequences: the sequences.
        embed: ``[batch, time]`` token ids to embeddings.
        device: where ``embed`` takes its ids.
        budget: positions per batch, including padding (a single sequence may have more).
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    for which in pack(lengths, budget, pass_positions(device)):
        ids = pad_rows([sequences[i].ids for i in which])[0]
        positions = torch.arange(ids.shape[1]).repeat(len(which), 1)
        rows: list[int] = []
        columns: list[int] = []
        for row, i in enumerate(which):
            sequence = sequences[i]
            if sequence.positions is not None:
                positions[row, : lengths[i]] = sequence.positions
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


def run_sequences(
    encoder: Callable[[Tensor, Tensor, Tensor], Tensor],
    sequences: Sequence[SoftSequence],
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    budget: int,
) -> list[Tensor]:
    """Hidden states ``[length, hidden]`` of each sequence, in batches of similar length.

    Args:
        encoder: embeddings, mask and positions of a batch to hidden states ``[batch, time, hidden]``.
        sequences, embed, device, budget: as in `soft_batches`.
    """
    out: dict[int, Tensor] = {}
    for batch in soft_batches(sequences, embed, device, budget=budget):
        out.update(batch.unpadded(encoder(batch.embeds, batch.mask, batch.positions)))
    return [out[i] for i in range(len(sequences))]


_watched: ContextVar[list[int] | None] = ContextVar("watched", default=None)
_MOST = 256  # sequences in a batch: more save no pass worth counting


def pass_positions(device: torch.device, gradients: bool | None = None) -> int:
    """What one more forward pass costs beside the positions that it runs, in positions.

    On a CPU a pass's own cost (reading the weights, Python) is that of a few positions, or of some hundred with the graph and
    the backward pass; a GPU is idle in passes of less than about a thousand.

    Args:
        device: where it runs.
        gradients: whether there is a backward pass; default: whether torch records one now.
    """
    if device.type != "cpu":
        return 1024
    return 400 if (torch.is_grad_enabled() if gradients is None else gradients) else 32


@contextlib.contextmanager
def watch_lengths() -> Iterator[list[int]]:
    """Collects the length of every sequence that is packed inside, padding left out: what an encoder has to read."""
    seen: list[int] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def check_batch_size(batch_size: int | None) -> None:
    """Raises ``ValueError`` for a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def pack(lengths: Sequence[int], budget: int, overhead: int = 0) -> Iterator[list[int]]:
    """Groups sequences of like length into the batches that cost least, which is what they pad plus what each costs itself.

    Args:
        lengths: length of each sequence.
        budget: positions a batch may take, padding counted (or one sequence, however long).
        overhead: the cost of a batch by itself, in positions; see `pass_positions`. With 0 nothing is padded.

    Yields:
        Indices into ``lengths``; every index once, the longest sequences first.
    """
    if (seen := _watched.get()) is not None:
        seen += lengths
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # Of the best split of the first j sequences: its cost, and where its last batch begins.
    cost, begin = [0], [0]
    for j in range(1, len(order) + 1):
        found = [(cost[j - 1] + lengths[order[j - 1]] + overhead, j - 1)]
        for i in range(j - 2, max(j - _MOST, 0) - 1, -1):
            area = (j - i) * lengths[order[i]]
            if area > budget:
                break
            found.append((cost[i] + area + overhead, i))
        best = min(found)  # of equal costs the larger batch
        cost.append(best[0])
        begin.append(best[1])
    ends = [len(order)]
    while ends[-1]:
        ends.append(begin[ends[-1]])
    for first, last in zip(ends[::-1], ends[-2::-1]):
        yield order[first:last]


def pad_rows(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[rows, longest]``, padded on the right."""
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask
