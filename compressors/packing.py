"""Sequences of unequal length into batches: as little padding as the passes that it saves are worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

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
