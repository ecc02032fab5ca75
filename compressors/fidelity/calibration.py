"""Maps signals to a probability by logistic regression with weights of at least 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST = 4.0  # standard deviations at which a signal is clipped, so that no single one decides
LEAST_ROWS = 8
_NEVER = -1e9  # below every score


@dataclass(frozen=True)
class MonotoneLogistic:
    """``p = sigmoid(bias + sum_j w_j z_j)`` with ``w_j >= 0`` and ``z_j = (x_j - mean_j) / scale_j``, clipped to +-4.

    A missing signal (NaN) counts as its mean.

    Attributes:
        means, scales, weights: one number per signal.
        bias: the logit when all signals are at their means.
    """

    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def __post_init__(self) -> None:
        sizes = {len(self.means), len(self.scales), len(self.weights)}
        numbers = (*self.means, *self.scales, *self.weights, self.bias)
        if len(sizes) != 1 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError("A calibration needs equally many finite means, scales and weights, and a finite bias.")
        if min(self.scales, default=1.0) <= 0 or min(self.weights, default=0.0) < 0:
            raise ValueError("A calibration's scales must be positive and its weights at least 0.")

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Signals ``[n, k]``, NaN where missing, to probabilities ``[n]``."""
        return _sigmoid(_standard(rows, self.means, self.scales) @ np.array(self.weights) + self.bias)

    @classmethod
    def fit(
        cls, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None, *, l2: float = 0.01
    ) -> MonotoneLogistic:
        """Minimises cross-entropy plus ``l2 / 2 * |w|^2``, a convex problem.

        Args:
            rows: signals ``[n, k]``, NaN where missing.
            targets: ``[n]`` in [0, 1].
            weights: ``[n]`` weight of each row; default: equal.

        Raises:
            ValueError: for fewer than 8 rows, targets outside [0, 1], or unequal lengths.
        """
        rows, targets = np.asarray(rows, dtype=float), np.asarray(targets, dtype=float)
        counts = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float)
        if rows.ndim != 2 or not len(rows) == len(targets) == len(counts):
            raise ValueError(
                f"Calibration needs one target (and weight) per row of signals, got {rows.shape} signals, "
                f"{len(targets)} targets and {len(counts)} weights."
            )
        if len(rows) < LEAST_ROWS:
            raise ValueError(f"Calibration needs at least {LEAST_ROWS} passages, got {len(rows)}; give more dev data.")
        if not bool(np.all((targets >= 0) & (targets <= 1))):
            raise ValueError("Targets must lie in the range from 0 to 1: answer quality from slots relative to text.")
        if not bool(np.all((counts >= 0) & np.isfinite(counts))) or not counts.sum() > 0:
            raise ValueError("Weights must be finite, at least 0, and not all 0.")
        means, scales = _moments(rows)
        z = np.hstack([_standard(rows, means, scales), np.ones((len(rows), 1))])
        share = counts / counts.sum()
        soft = (targets * len(rows) + 0.5) / (len(rows) + 1)  # keeps the bias finite if all targets are equal
        found = _minimise(z, soft, share, l2)
        return cls(tuple(means), tuple(scales), tuple(found[:-1].tolist()), float(found[-1]))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict for `from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MonotoneLogistic:
        """Reads `to_dict`. Raises ``ValueError`` for an invalid dict."""
        try:
            means, scales, weights = (tuple(map(float, data[name])) for name in ("means", "scales", "weights"))
            return cls(means, scales, weights, float(data["bias"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"Invalid calibration: {error!r}.") from error


def _moments(rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Means and standard deviations of the columns, ignoring NaN; 0 and 1 for an empty or constant column."""
    means, scales = [], []
    for column in rows.T:
        there = column[np.isfinite(column)]
        spread = float(there.std()) if len(there) else 0.0
        means.append(float(there.mean()) if len(there) else 0.0)
        scales.append(spread if spread > 1e-12 else 1.0)
    return means, scales


def _standard(rows: np.ndarray, means: Sequence[float], scales: Sequence[float]) -> np.ndarray:
    rows = np.asarray(rows, dtype=float)
    if rows.ndim != 2 or rows.shape[1] != len(means):
        raise ValueError(f"Signals must be [passages, {len(means)}], got {list(rows.shape)}.")
    z = np.clip((rows - np.array(means)) / np.array(scales), -MOST, MOST)
    return np.where(np.isfinite(z), z, 0.0)


def _minimise(z: np.ndarray, targets: np.ndarray, share: np.ndarray, l2: float) -> np.ndarray:
    """Projected gradient descent with Nesterov momentum; the last column is the bias, unconstrained and unpenalised."""
    penalty = np.full(z.shape[1], l2)
    penalty[-1] = 0.0
    step = 1.0 / (0.25 * float(np.linalg.eigvalsh(z.T @ (share[:, None] * z))[-1]) + l2)
    here = ahead = np.zeros(z.shape[1])
    momentum = 1.0
    for _ in range(20_000):
        gradient = z.T @ (share * (_sigmoid(z @ ahead) - targets)) + penalty * ahead
        there = ahead - step * gradient
        there[:-1] = np.maximum(there[:-1], 0.0)
        if float((there - here) @ gradient) > 0:  # the momentum has overshot
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = there + (momentum - 1) / following * (there - here)
        moved = float(np.abs(there - here).max())
        here, momentum = there, following
        if moved < 1e-9:
            break
    return here


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def signal_rows(measured: Sequence[Sequence[float | None]], size: int) -> np.ndarray:
    """Measured passages as an array ``[n, size]``, NaN where a signal is missing."""
    return np.array([[np.nan if v is None else v for v in row] for row in measured], dtype=float).reshape(-1, size)


def threshold_leaving(scores: np.ndarray, losses: np.ndarray, left: float) -> float:
    """The lowest score at which passages from it on lose at most the share ``left`` of all loss; -1e9 without any loss."""
    order = np.argsort(scores, kind="stable")
    ranked, lost = scores[order], np.cumsum(losses[order])
    if not len(lost) or lost[-1] <= 0:
        return _NEVER
    sent = int(np.searchsorted(lost, (1 - left) * lost[-1] - 1e-12)) + 1
    while sent < len(ranked) and ranked[sent] == ranked[sent - 1]:
        sent += 1
    return float((ranked[sent - 1] + ranked[sent]) / 2 if sent < len(ranked) else (ranked[-1] + 1) / 2)
