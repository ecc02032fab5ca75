"""One budget of tokens divided between passages, exactly."""

from __future__ import annotations

from collections.abc import Sequence


def kept_share(ratio: float) -> float:
    """``1 / ratio`` as whoever asked for ``ratio=1 / rate`` meant it: ``1 / (1 / 0.9)`` is 0.9, not a bit above.

    Published thresholds are whole percents or ranks that such a bit moves.
    """
    return round(1 / ratio, 12)


def share_out(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights, none above its cap.

    What a capped share cannot take goes to the others, in proportion to theirs; what rounding leaves goes to the largest
    remainders.

    Args:
        total: what is divided.
        weights: not negative; where all that are left are 0 the caps take their place.
        caps: the most that each share may have.

    Returns:
        One number a weight; their sum is the smaller of ``total`` and the sum of the caps.

    Raises:
        ValueError: if there is not one cap a weight, or a weight is negative or no number.
    """
    if len(weights) != len(caps):
        raise ValueError(f"One cap a weight is needed: got {len(caps)} caps for {len(weights)} weights.")
    if any(not 0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"Weights must be finite numbers of at least 0, got {list(weights)}.")
    out = [0] * len(weights)
    left = min(total, sum(caps))
    unfilled = [i for i, cap in enumerate(caps) if cap > 0]
    while unfilled:
        largest = max(weights[i] for i in unfilled)
        parts = {i: weights[i] / largest if largest > 0 else float(caps[i]) for i in unfilled}
        factor = left / sum(parts.values())
        full = [i for i in unfilled if parts[i] * factor >= caps[i]]
        if not full:
            break
        for i in full:
            out[i] = caps[i]
            left -= caps[i]
        unfilled = [i for i in unfilled if i not in set(full)]
    if unfilled:
        exact = {i: parts[i] * factor for i in unfilled}
        for i in unfilled:
            out[i] = int(exact[i])
        rest = left - sum(out[i] for i in unfilled)
        for i in sorted(unfilled, key=lambda i: (out[i] - exact[i], i))[:rest]:
            out[i] += 1
    return out
