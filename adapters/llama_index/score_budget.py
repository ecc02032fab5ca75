"""A policy that divides a budget between the passages by their retrieval scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .allocation import allocate, ratio_of
from .policy import LEFT_OUT, TEXT, Form, Policy, Retrieved, check_count, is_number

_TRIES = 8  # compressors round, and a blank line stands behind each passage: the sum is right after a few corrections


@dataclass(frozen=True)
class ScoreBudget(Policy):
    """All passages compressed, each by a ratio of its own: the nearer to the question, the more of ``n`` reader positions.

    How they are divided is said in `allocation.allocate`; scores of any retriever or reranker will do, and
    equal ones give every passage the same ratio. The compressor must take any ratio (mean-pooled windows do); at query time
    passages are compressed by ratios that an index holds in no store. Where all passages fit as text they are text. The
    budget is kept: where not even ``highest`` is enough, the passages of lowest score are left out. `choose` raises
    ``ValueError`` if a passage has no score, or not even the first one fits.

    Args:
        n: reader positions, as with `TokenBudget`.
        temperature: the lower, the more the best passages get; in standard deviations of the scores.
        lowest: compression ratio that no passage falls below (one that the compressor was trained for).
        highest: compression ratio that none exceeds.
    """

    n: int
    temperature: float = 1.0
    lowest: float = 1.0
    highest: float = 64.0

    def __post_init__(self) -> None:
        check_count("ScoreBudget", "n", self.n, 1)
        numbers = (self.temperature, self.lowest, self.highest)
        if not (all(map(is_number, numbers)) and self.temperature > 0 and 1 <= self.lowest <= self.highest):
            raise ValueError(
                "ScoreBudget needs temperature > 0 and 1 <= lowest <= highest, got "
                f"temperature={self.temperature!r}, lowest={self.lowest!r} and highest={self.highest!r}."
            )

    def choose(self, retrieved: Retrieved) -> list[Form]:
        """One `Form` a passage, in order."""
        text = retrieved.text_positions()
        if sum(text) <= self.n:
            return [TEXT] * len(text)
        scores = []
        for place, score in enumerate(retrieved.scores):
            if score is None:
                raise ValueError(
                    f"{self} goes by scores, but passage {place} has none; use a retriever or reranker that scores, or "
                    "AutoBudget."
                )
            scores.append(score)
        ranked = sorted(range(len(text)), key=lambda place: -scores[place])
        while ranked:
            if (forms := self._divided(retrieved, text, scores, sorted(ranked))) is not None:
                return [forms.get(place, LEFT_OUT) for place in range(len(text))]
            ranked.pop()
        raise ValueError(f"{self} has no room for even the best passage at ratio {self.highest:g}.")

    def _divided(
        self, retrieved: Retrieved, text: Sequence[int], scores: list[float], places: list[int]
    ) -> dict[int, Form] | None:
        """Forms of the passages at some places that keep the budget together, None if there are none."""
        tokens = [text[place] for place in places]
        chosen = [scores[place] for place in places]
        aim = self.n
        for _ in range(_TRIES):
            try:
                slots = allocate(
                    tokens, chosen, aim, temperature=self.temperature, lowest=self.lowest, highest=self.highest
                )
            except ValueError:
                return None  # not even the highest ratio leaves room for all of them
            ratios = {place: ratio_of(n, k) for place, n, k in zip(places, tokens, slots) if k}
            costs = [retrieved.compressed_positions(ratio, [place])[0] for place, ratio in ratios.items()]
            if (over := sum(costs) - self.n) <= 0:
                return {place: Form("compressed", ratios[place]) if place in ratios else TEXT for place in places}
            aim -= over
        return None
