"""Metrics of answers, compression, and bootstrap intervals.

Equation numbers are those of "When Text Embedding Meets Large Language Model: A Comprehensive Survey"
(https://arxiv.org/abs/2412.09165), section 2.4.1. Scores lie in [0, 1] unless a docstring says otherwise.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Hashable, Sequence

import numpy as np

from ..compressors.core.keep import KINDS
from ..recipes.data.answer_scores import best, normalize
from ..recipes.data.answer_scores import exact_match as exact_match
from ..recipes.data.answer_scores import f1 as f1


def containment(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction contains a reference answer as whole words, after normalisation, else 0.0."""
    guess = f" {normalize(prediction)} "
    return best(answers, lambda answer: float(bool(words := normalize(answer)) and f" {words} " in guess))


def token_exact_match(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Equation 12: share of the reference's tokens that the prediction has at the same position.

    One inserted token costs all that follow; this is not SQuAD's exact match.
    """
    if not reference:
        raise ValueError("token_exact_match needs a reference answer of at least one token, got none.")
    return sum(guess == truth for guess, truth in zip(prediction, reference, strict=False)) / len(reference)


def rouge_l(prediction: Sequence[Hashable], reference: Sequence[Hashable], beta: float = 1.0) -> float:
    """Equations 13-15: F-measure of the longest common subsequence; `beta` weighs recall (1 is the harmonic mean)."""
    if beta < 0 or not math.isfinite(beta):
        raise ValueError(f"rouge_l needs a finite beta of at least 0, got {beta}.")
    common = longest_common_subsequence(prediction, reference)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def rouge_l_answer(prediction: str, answers: Sequence[str], beta: float = 1.0) -> float:
    """ROUGE-L over normalised words, the best over the reference answers."""
    words = normalize(prediction).split()
    return best(answers, lambda answer: rouge_l(words, normalize(answer).split(), beta))


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for item in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if item == other else max(row[j], row[j - 1])
    return row[-1]


def surviving(kind: str, sources: Sequence[str], texts: Sequence[str]) -> float | None:
    """Share of the different numbers, names, ... of some sources that are still in some texts; ``None`` if there are none.

    Args:
        kind: a kind of words that `keep` takes, such as ``"numbers"``.
        sources: the passages.
        texts: what is left of them.
    """
    wanted = {source[a:b] for source in sources for a, b in KINDS[kind](source)}
    text = "\n".join(texts)
    found = [re.search(rf"(?<!\w){re.escape(one)}(?!\w|[.,]\d)", text) is not None for one in wanted]
    return sum(found) / len(found) if found else None


def perplexity_product(log_probs: Sequence[float]) -> float:
    """Equation 11 as written: product over the answer's tokens of 1 / p(token | before). Grows with the length."""
    return _exp(-float(np.sum(_nonempty(log_probs, "perplexity_product"))))


def perplexity_per_token(log_probs: Sequence[float]) -> float:
    """Usual perplexity: the geometric mean of 1 / p(token | before)."""
    return _exp(-float(np.mean(_nonempty(log_probs, "perplexity_per_token"))))


def compression_rate(tokens: int, slots: int) -> float:
    """Equation 10: l / L, smaller is shorter; 1.0 for an empty source."""
    if tokens < 0 or slots < 0:
        raise ValueError(f"Lengths cannot be negative, got tokens={tokens} and slots={slots}.")
    if tokens == 0:
        return 1.0 if slots == 0 else math.inf
    return slots / tokens


def compression_ratio(tokens: int, slots: int) -> float:
    """L / l; 16 means sixteen times shorter."""
    rate = compression_rate(tokens, slots)
    return math.inf if rate == 0 else 1 / rate


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0, repeats: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values`."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("A bootstrap interval needs at least one value, got none.")
    if repeats < 1:
        raise ValueError(f"A bootstrap needs repeats >= 1, got {repeats}.")
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // len(values))  # bounds memory
    sizes = [min(block, repeats - start) for start in range(0, repeats, block)]
    means = [values[rng.integers(0, len(values), (size, len(values)))].mean(axis=1) for size in sizes]
    return interval(np.concatenate(means))


def pooled_recovered_share(
    sets: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, seed: int = 0, repeats: int = 2000
) -> tuple[float, float, float] | None:
    """Mean over sets of the recovered share, with its 95 % percentile bootstrap interval: share, low, high.

    Args:
        sets: Per set the scores, those of no context and those of the full text, each `[questions]`, paired. Questions are
            resampled within their set.

    None where the full text of a set cannot be told from no context. Raises ValueError for no sets or unpaired scores.
    """
    if not sets:
        raise ValueError("A pooled share needs at least one set, got none.")
    total, there, share = np.zeros(repeats), np.ones(repeats, dtype=bool), 0.0
    for k, (scores, none, full) in enumerate(sets):
        if not len(scores) == len(none) == len(full):
            raise ValueError(f"Scores must be paired by question, got {len(scores)}, {len(none)} and {len(full)}.")
        # a seed per set, so that draws are independent
        means = _draws(len(scores), repeats, seed + 7919 * k) @ np.stack([scores, none, full], axis=1).astype(float)
        gains = means[:, 2] - means[:, 1]
        if (gains <= 0).sum() > repeats * 0.025:
            return None
        there &= gains > 0
        total += (means[:, 0] - means[:, 1]) / np.where(gains > 0, gains, 1.0)
        share += float((np.mean(scores) - np.mean(none)) / (np.mean(full) - np.mean(none)))
    low, high = interval(total[there] / len(sets))
    return share / len(sets), low, high


@functools.lru_cache(maxsize=8)
def _draws(n: int, repeats: int, seed: int) -> np.ndarray:
    """`[repeats, n]`: the share of each of n questions in a draw of n with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=repeats) / n


def recovered(scores: np.ndarray, none: np.ndarray, full: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """The row keys `recovered_share`, `ci_low` and `ci_high`; empty without a gain to recover."""
    found = pooled_recovered_share([(scores, none, full)], seed=seed)
    return {} if found is None else dict(zip(("recovered_share", "ci_low", "ci_high"), found))


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The range of the middle 95 % of samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def _nonempty(log_probs: Sequence[float], name: str) -> Sequence[float]:
    if len(log_probs) == 0:
        raise ValueError(f"{name} needs the log-probability of at least one token, got none.")
    return log_probs


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
