"""How passages are cut into segments, and which tokens each slot stands for: what the methods with memory tokens share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def equal_lengths(n_tokens: int, longest: int) -> list[int]:
    """Lengths of as few segments as there can be, all of ``ceil(n_tokens / count)`` tokens but for a shorter last one."""
    if not n_tokens:
        return []
    count = -(-n_tokens // longest)
    length = -(-n_tokens // count)
    return [min(length, n_tokens - start) for start in range(0, n_tokens, length)]


def slots_for(n_tokens: int, ratio: float, most: int) -> int:
    """Slots of a segment: ``ceil(n_tokens / ratio)``, at least one and at most ``most``."""
    # The small term keeps 10 / 2.5 at 4 in spite of floating point.
    return min(max(math.ceil(n_tokens / ratio - 1e-6), 1), most)


def spread(n_tokens: int, slots: int) -> Tensor:
    """``[slots]``: the token in the middle of each slot's own run."""
    return ((torch.arange(slots) + 0.5) * (n_tokens / slots)).long()


def slot_of_token(lengths: Sequence[int], slots: Sequence[int]) -> Tensor:
    """``[all tokens]``: the slot, counted over all segments, that each token belongs to when each segment is cut into as
    many even runs as it has slots."""
    of, first = [torch.zeros(0, dtype=torch.long)], 0
    for length, n in zip(lengths, slots, strict=True):
        of.append(torch.arange(length) * n // length + first)
        first += n
    return torch.cat(of)
