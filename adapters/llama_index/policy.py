"""Policies: which retrieved passages the LLM reads as text, which compressed, and by what ratio.

A policy is any object with ``choose(retrieved) -> list[Form]``. Those here are dataclasses, given as
``CompressedContextPostprocessor(compressor, policy=TokenBudget(512))``. The rank of a passage is its place in the list.

Budgets are reader positions of the passages: tokens of text (including the metadata that LlamaIndex shows), slots, and a
blank line after each. The rest of the prompt, the question and the answer are not included.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from .allocation import allocate, ratio_of

_TRIES = 8  # corrections of the sum: compressors round, and each passage costs a blank line


@dataclass(frozen=True)
class Form:
    """How the LLM reads a passage: as text, compressed (by ``ratio``, else the postprocessor's ratio), or not at all.

    ``why`` names the reason if it is not the policy's own rule; it does not count in comparisons.
    """

    read: Literal["text", "compressed", "left out"]
    ratio: float | None = None
    why: str | None = field(default=None, compare=False)


TEXT, COMPRESSED, LEFT_OUT = Form("text"), Form("compressed"), Form("left out")
UNFAITHFUL = Form("text", why="fidelity")


class Retrieved(Protocol):
    """What a policy sees: the request's passages by rank, without images and other nodes that have no text."""

    @property
    def scores(self) -> Sequence[float | None]:
        """Each node's score; ``None`` if the retriever gives none."""
        ...

    def text_positions(self) -> Sequence[int]:
        """Reader positions of each passage as text, including a blank line."""
        ...

    def compressed_positions(self, ratio: float | None, places: Sequence[int]) -> Sequence[int]:
        """Reader positions of the passages at ``places``, compressed now by ``ratio`` (``None``: the postprocessor's)."""
        ...

    def fidelities(self, ratio: float | None, places: Sequence[int]) -> Sequence[float | None]:
        """The gate's scores of the passages at ``places``, compressed by ``ratio``; ``None``: not compressible."""
        ...


class Policy(ABC):
    """Decides how the LLM reads each passage."""

    keeps_budget: ClassVar[bool] = (
        False  # whether text in the place of a compressed passage breaks the policy's promise
    )

    @abstractmethod
    def choose(self, retrieved: Retrieved) -> list[Form]:
        """Return one `Form` per passage, in order."""


@dataclass(frozen=True)
class TextForTop(Policy):
    """The first ``k`` passages as text, the rest compressed."""

    k: int

    def __post_init__(self) -> None:
        check_count("TextForTop", "k", self.k, 0)

    def choose(self, retrieved: Retrieved) -> list[Form]:
        return [TEXT if place < self.k else COMPRESSED for place in range(len(retrieved.scores))]


@dataclass(frozen=True)
class TextAbove(Policy):
    """Passages that score at least ``score`` as text, the rest compressed.

    `choose` raises ``ValueError`` if a passage has no score.
    """

    score: float

    def __post_init__(self) -> None:
        if not is_number(self.score):
            raise ValueError(f"TextAbove needs the score from which passages stay text, got {self.score!r}.")

    def choose(self, retrieved: Retrieved) -> list[Form]:
        forms = []
        for place, score in enumerate(retrieved.scores):
            if score is None or math.isnan(score):
                raise ValueError(
                    f"TextAbove({self.score}) goes by scores, but passage {place} has {_said(score)}; use a retriever or "
                    "reranker that scores, or TextForTop."
                )
            forms.append(TEXT if score >= self.score else COMPRESSED)
        return forms


@dataclass(frozen=True)
class TokenBudget(Policy):
    """The first passages as text, as many as fit into ``n`` reader positions together with the compressed rest.

    The budget is strict: if not even the compressed passages fit, the last ones are left out. A compressed passage that is
    not shorter than its text is read as text. `choose` raises ``ValueError`` if not even the first passage fits.
    """

    keeps_budget: ClassVar[bool] = True
    n: int

    def __post_init__(self) -> None:
        check_count("TokenBudget", "n", self.n, 1)

    def choose(self, retrieved: Retrieved) -> list[Form]:
        text = retrieved.text_positions()
        if sum(text) <= self.n:
            return [TEXT] * len(text)
        forms, costs = _shortest(self, self.n, None, retrieved)
        room = self.n - sum(costs)
        for place, (tokens, cost) in enumerate(zip(text, costs)):
            room -= tokens - cost
            if room < 0:
                break
            forms[place] = TEXT
        return forms


@dataclass(frozen=True)
class AutoBudget(Policy):
    """Fills ``n`` reader positions with text and the compressor's ratios.

    By rank, each passage gets the longest form that leaves room for all others in their shortest: text, else the lowest of
    ``ratios`` that fits. The budget is strict as in `TokenBudget`.

    Args:
        n: reader positions.
        ratios: compression ratios that the compressor was trained for; default: the postprocessor's ratio alone.
    """

    keeps_budget: ClassVar[bool] = True
    n: int
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_count("AutoBudget", "n", self.n, 1)
        if self.ratios is None:
            return
        if isinstance(self.ratios, str) or not isinstance(self.ratios, Sequence):
            raise ValueError(f"AutoBudget's ratios must be a list of compression ratios, got {self.ratios!r}.")
        if not self.ratios or not all(is_number(ratio) and ratio >= 1 for ratio in self.ratios):
            raise ValueError(f"AutoBudget's ratios must be finite numbers of at least 1, got {self.ratios!r}.")
        object.__setattr__(self, "ratios", tuple(sorted(set(map(float, self.ratios)))))

    def choose(self, retrieved: Retrieved) -> list[Form]:
        text = retrieved.text_positions()
        if sum(text) <= self.n:
            return [TEXT] * len(text)
        ratios = self.ratios or (None,)
        forms, costs = _shortest(self, self.n, ratios[-1], retrieved)
        room = self.n - sum(costs)
        for place, (tokens, cost) in enumerate(zip(text, costs)):
            more = tokens - cost
            if more <= room:
                forms[place], room = TEXT, room - more
                continue
            for ratio in ratios[:-1]:
                more = retrieved.compressed_positions(ratio, [place])[0] - cost
                if more <= room:
                    forms[place], room = Form("compressed", ratio), room - more
                    break
        return forms


@dataclass(frozen=True)
class ScoreBudget(Policy):
    """All passages compressed, each by its own ratio: a higher score gets more of ``n`` reader positions.

    `allocation.allocate` divides them. Scores of any retriever or reranker work; equal scores give equal ratios. The
    compressor must take any ratio (mean-pooled windows do), and passages are compressed at query time, because no store
    holds these ratios. If all passages fit as text they are read as text. The budget is strict: if ``highest`` is not
    enough, the passages with the lowest scores are left out. `choose` raises ``ValueError`` if a passage has no score, or
    if not even the best one fits.

    Args:
        n: reader positions, as in `TokenBudget`.
        temperature: in standard deviations of the scores; the lower, the more the best passages get.
        lowest: lowest compression ratio of a passage (one that the compressor was trained for).
        highest: highest compression ratio of a passage.
    """

    keeps_budget: ClassVar[bool] = True
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
        text = retrieved.text_positions()
        if sum(text) <= self.n:
            return [TEXT] * len(text)
        scores = []
        for place, score in enumerate(retrieved.scores):
            if score is None or not math.isfinite(score):
                raise ValueError(
                    f"{self} goes by scores, but passage {place} has {_said(score)}; use a retriever or reranker that scores, "
                    "or AutoBudget."
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
        """Forms of the passages at ``places`` that together keep the budget, if there are any."""
        tokens = [text[place] for place in places]
        chosen = [scores[place] for place in places]
        aim = self.n
        for _ in range(_TRIES):
            try:
                slots = allocate(
                    tokens, chosen, aim, temperature=self.temperature, lowest=self.lowest, highest=self.highest
                )
            except ValueError:
                return None  # the highest ratio does not leave room for all of them
            ratios = {place: ratio_of(n, k) for place, n, k in zip(places, tokens, slots) if k}
            costs = [retrieved.compressed_positions(ratio, [place])[0] for place, ratio in ratios.items()]
            if (over := sum(costs) - self.n) <= 0:
                return {place: Form("compressed", ratios[place]) if place in ratios else TEXT for place in places}
            aim -= over
        return None


class TextBelowFidelity(Policy):
    """Another policy's choice, with text for passages whose compression lost too much.

    ``CompressedContextPostprocessor(fidelity=...)`` wraps its policy in this; it needs a `FidelityGate`. Text costs its full
    length, so the inner policy cannot have a budget.

    Args:
        threshold: passages with a lower score are read as text.
        policy: chooses first.

    Raises:
        ValueError: if ``policy`` has a budget.
    """

    def __init__(self, threshold: float, policy: Policy) -> None:
        if getattr(policy, "keeps_budget", False):
            raise ValueError(
                f"{policy} keeps a budget, which passages sent back to text would break; use fidelity with "
                "TextForTop, TextAbove or no policy."
            )
        self.threshold = threshold
        self.policy = policy

    def choose(self, retrieved: Retrieved) -> list[Form]:
        forms = list(self.policy.choose(retrieved))
        for ratio, places in compressed_by_ratio(forms).items():
            for place, score in zip(places, retrieved.fidelities(ratio, places)):
                if score is not None and score < self.threshold:
                    forms[place] = UNFAITHFUL
        return forms


def compressed_by_ratio(forms: Sequence[Form]) -> dict[float | None, list[int]]:
    """Group the places of the compressed forms by their ratios."""
    found: dict[float | None, list[int]] = {}
    for place, form in enumerate(forms):
        if form.read == "compressed":
            found.setdefault(form.ratio, []).append(place)
    return found


def _shortest(policy: Policy, n: int, ratio: float | None, retrieved: Retrieved) -> tuple[list[Form], list[int]]:
    """Each passage in its shortest form, the last ones left out if not all fit; and the costs of the others."""
    text = retrieved.text_positions()
    compressed = retrieved.compressed_positions(ratio, range(len(text)))
    forms = [TEXT if t <= c else Form("compressed", ratio) for t, c in zip(text, compressed)]
    costs = [min(pair) for pair in zip(text, compressed)]
    read = len(costs)
    while sum(costs[:read]) > n:
        read -= 1
    if costs and not read:
        raise ValueError(f"{policy} has no room for even the first passage, which takes {costs[0]} positions.")
    return forms[:read] + [LEFT_OUT] * (len(forms) - read), costs[:read]


def as_policy(given: Any) -> Policy:
    """Return a policy as given, from a dict that `policy_to_dict` wrote, or (for ``None``) one that compresses everything.

    Raises:
        TypeError: for anything else.
    """
    if given is None:
        return TextForTop(0)
    if isinstance(given, Mapping):
        known = {kind.__name__: kind for kind in _KINDS}
        settings = dict(given)
        if (name := settings.pop("policy", None)) in known:
            return known[name](**settings)
    elif not isinstance(given, type) and callable(getattr(given, "choose", None)):
        return given
    raise TypeError(
        "policy must be TextForTop(k), TextAbove(score), TokenBudget(n), AutoBudget(n), ScoreBudget(n) or an object with a "
        f"method choose(retrieved), got {given!r}."
    )


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Return a JSON-able dict of a policy; for a user's own policy, only its name."""
    kind = type(policy)
    settings = asdict(policy) if kind in _KINDS else {}  # type: ignore[call-overload]
    return {"policy": kind.__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}


_KINDS: tuple[type[Policy], ...] = (TextForTop, TextAbove, TokenBudget, AutoBudget, ScoreBudget)


def check_count(policy: str, name: str, value: Any, least: int) -> None:
    """Raises ``ValueError`` unless a policy's setting is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{policy}'s {name} must be an integer of at least {least}, got {value!r}.")


def _said(score: float | None) -> str:
    return "none" if score is None else str(score)


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
