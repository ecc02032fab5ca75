"""Divide a budget of slots between passages by their retrieval scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...compressors.text.budget import share_out

_UP = 1 + 1e-9  # keeps ceil(tokens / ratio) exact in floating point


def allocate(
    tokens: Sequence[int],
    scores: Sequence[float],
    budget: int,
    *,
    temperature: float = 1.0,
    lowest: float = 1.0,
    highest: float = math.inf,
) -> list[int]:
    r"""Return the slots of each passage.

    With :math:`z` the standardised scores, passage i of :math:`L_i` tokens gets slots in proportion to
    :math:`L_i e^{z_i / T}`. Scores of any retriever work; equal scores, or a high temperature, give equal ratios.

    Args:
        tokens: tokens of each passage.
        scores: one per passage; higher is better.
        budget: slots of all passages together.
        temperature: T; the lower, the more the best passages get.
        lowest: lowest compression ratio of a passage.
        highest: highest compression ratio of a passage. Every passage with a token gets at least one slot.

    Returns:
        Slots that sum to the budget if the two bounds allow it; see `ratio_of`.

    Raises:
        ValueError: if the lists differ in length, a number is out of range, or the budget is too small for ``highest``.
    """
    if len(tokens) != len(scores):
        raise ValueError(f"One score a passage is needed: got {len(scores)} scores for {len(tokens)} passages.")
    if any(n < 0 for n in tokens) or not all(map(math.isfinite, scores)):
        raise ValueError("Passages have at least 0 tokens and finite scores; give the retriever's own scores.")
    if not (temperature > 0 and 1 <= lowest <= highest):
        raise ValueError(
            "Allocation needs temperature > 0 and 1 <= lowest <= highest, got "
            f"temperature={temperature}, lowest={lowest} and highest={highest}."
        )
    least = [min(n, max(1, math.ceil(n / highest - 1e-6))) for n in tokens]
    if sum(least) > budget:
        raise ValueError(
            f"A budget of {budget} slots is too small: {len(tokens)} passages take at least {sum(least)} at ratios of at most "
            f"{highest:g}; raise the budget, or read fewer passages."
        )
    most = [max(int(n / lowest + 1e-6), few) for n, few in zip(tokens, least)]
    weights = _weights(tokens, scores, temperature)
    out = list(least)
    free = list(range(len(tokens)))
    while free:
        left = budget - sum(out[i] for i in range(len(tokens)) if i not in free)
        given = dict(zip(free, share_out(left, [weights[i] for i in free], [most[i] for i in free])))
        short = [i for i in free if given[i] < least[i]]
        if not short:
            for i, slots in given.items():
                out[i] = slots
            break
        free = [i for i in free if i not in short]  # these keep their least; the others share the rest
    return out


def ratio_of(tokens: int, slots: int) -> float:
    """Return the ratio at which a passage gets this many slots, for compressors that make ``ceil(tokens / ratio)``.

    Raises:
        ValueError: for no slots, or more slots than tokens.
    """
    if not 1 <= slots <= tokens:
        raise ValueError(f"A passage of {tokens} tokens has 1 to {tokens} slots, got {slots}.")
    return max(1.0, tokens / slots * _UP) if slots < tokens else 1.0


def _weights(tokens: Sequence[int], scores: Sequence[float], temperature: float) -> list[float]:
    if not scores:
        return []
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if spread <= 1e-9 * max(1.0, max(map(abs, scores))):
        return [float(n) for n in tokens]  # they differ in the last bits at most
    best = max(scores)
    return [n * math.exp((score - best) / (spread * temperature)) for n, score in zip(tokens, scores)]
