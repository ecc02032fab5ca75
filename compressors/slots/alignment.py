"""What one tokenizer's tokens hold, carried over to another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def averaged(
    values: Tensor, spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], characters: int
) -> tuple[Tensor, Tensor]:
    """Values of one tokenizer's tokens carried over to another's, by the characters that they share.

    Args:
        values: ``[tokens, size]``.
        spans: ``(start, end)`` characters of each of these tokens.
        wanted: characters of the other tokenizer's tokens.
        characters: length of the text.

    Returns:
        ``[wanted, size]`` means over each wanted token's characters, and ``[wanted]`` whether there was anything to average
        (white space, say, belongs to no token of BERT's); zeros where there was not.
    """
    device = values.device
    owner = torch.full((characters,), -1, device=device)
    lengths = torch.tensor([b - a for a, b in spans], dtype=torch.long, device=device)
    starts = torch.tensor([a for a, _ in spans], dtype=torch.long, device=device)
    owner[_ranges(starts, lengths)] = torch.repeat_interleave(torch.arange(len(spans), device=device), lengths)
    lengths = torch.tensor([b - a for a, b in wanted], dtype=torch.long, device=device)
    starts = torch.tensor([a for a, _ in wanted], dtype=torch.long, device=device)
    token = torch.repeat_interleave(torch.arange(len(wanted), device=device), lengths)
    source = owner[_ranges(starts, lengths)]
    token, source = token[source >= 0], source[source >= 0]
    total = values.new_zeros(len(wanted), values.shape[1]).index_add(0, token, values[source])
    count = torch.bincount(token, minlength=len(wanted))
    return total / count.clamp(min=1)[:, None], count > 0


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers of all ranges ``[start, start + length)``, one range after the other."""
    if not len(lengths):
        return starts
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + torch.repeat_interleave(starts - first, lengths)
