"""How passages are cut into segments, and which tokens each slot stands for: what the methods with memory tokens share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .nested import NestedSlot


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


def tokens_of_slots(
    lengths: Sequence[int], slots: Sequence[int], nests: Sequence[Sequence[NestedSlot] | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs of a token and a slot that stands for it, ``[pairs]`` each, both counted over all segments.

    Args:
        lengths: tokens of each segment.
        slots: slots of each segment.
        nests: the windows of each segment's slots, where they are nested; else they are even runs (`slot_of_token`).
    """
    if nests is None or not any(nests):
        owner = slot_of_token(lengths, slots)
        return torch.arange(len(owner)), owner
    tokens, owners = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    first = slot = 0
    for length, n, nest in zip(lengths, slots, nests, strict=True):
        if nest is None:
            tokens.append(torch.arange(first, first + length))
            owners.append(slot + slot_of_token([length], [n]))
        else:
            tokens += [torch.arange(first + start, first + end) for start, end, _ in nest]
            sizes = torch.tensor([end - start for start, end, _ in nest], dtype=torch.long)
            owners.append(torch.repeat_interleave(torch.arange(slot, slot + n), sizes))
        first += length
        slot += n
    return torch.cat(tokens), torch.cat(owners)


def memory_row(slots: int, nest: Sequence[NestedSlot] | None) -> list[int]:
    """Which memory token each slot of a segment is: the first, the second, ..., or that of its rank if they are nested."""
    return list(range(slots)) if nest is None else [slot.rank for slot in nest]


def middles(n_tokens: int, slots: int, nest: Sequence[NestedSlot] | None) -> Tensor:
    """``[slots]``: the token in the middle of what each slot of a segment stands for."""
    return spread(n_tokens, slots) if nest is None else torch.tensor([(a + b) // 2 for a, b, _ in nest])
