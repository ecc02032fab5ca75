"""Mixed contexts: which of the retrieved passages the LLM reads as text, which compressed, and how strongly.

A policy is any object with ``choose(retrieved) -> list[Form]``; those here are plain dataclasses, given as
``CompressedContextPostprocessor(compressor, policy=TokenBudget(512))``. Passages are ranked by their place in the list.

Budgets are in reader positions and count what stands for the passages in the prompt: tokens of text (with the metadata
that LlamaIndex shows), slots, and a blank line behind each. The prompt's own words, the question and the answer come on top.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Form:
    """How the LLM reads a passage: as text, compressed (by the postprocessor's ratio unless one is given), or not at all.

    ``why`` says what decided so where it was not the policy's rule; forms that differ in it alone are equal.
    """

    read: Literal["text", "compressed", "left out"]
    ratio: float | None = None
    why: str | None = field(default=None, compare=False)


TEXT, COMPRESSED, LEFT_OUT = Form("text"), Form("compressed"), Form("left out")
UNFAITHFUL = Form("text", why="fidelity")


class Retrieved(Protocol):
    """What a policy sees of a request's passages, in order of rank. Images and other nodes without text are not among them."""

    @property
    def scores(self) -> Sequence[float | None]:
        """Each node's score, ``None`` where the retriever gives none."""
        ...

    def text_positions(self) -> Sequence[int]:
        """Reader positions of each passage as text, a blank line included."""
        ...

    def compressed_positions(self, ratio: float | None, places: Sequence[int]) -> Sequence[int]:
        """Reader positions of the passages at ``places``, compressed now by ``ratio`` (``None``: the postprocessor's)."""
        ...

    def fidelities(self, ratio: float | None, places: Sequence[int]) -> Sequence[float | None]:
        """The gate's score of the passages at ``places``, compressed by ``ratio``; ``None``: could not be compressed."""
        ...


class Policy(ABC):
    """What decides how the LLM reads each passage."""

    @abstractmethod
    def choose(self, retrieved: Retrieved) -> list[Form]:
        """One `Form` a passage, in order."""


@dataclass(frozen=True)
class TextForTop(Policy):
    """The first ``k`` passages as text, the rest compressed."""

    k: int

    def __post_init__(self) -> None:
        check_count("TextForTop", "k", self.k, 0)

    def choose(self, retrieved: Retrieved) -> list[Form]:
        """One `Form` a passage, in order."""
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
        """One `Form` a passage, in order."""
        forms = []
        for place, score in enumerate(retrieved.scores):
            if score is None:
                raise ValueError(
                    f"TextAbove({self.score}) goes by scores, but passage {place} has none; use a retriever or reranker "
                    "that scores, or TextForTop."
                )
            forms.append(TEXT if score >= self.score else COMPRESSED)
        return forms


@dataclass(frozen=True)
class TokenBudget(Policy):
    """As many of the first passages as text as fit into ``n`` reader positions beside the compressed rest.

    The budget is kept: where not even the compressed passages fit, the last ones are left out, as a score cut-off would.
    A compressed passage that is no shorter than its text is read as text. `choose` raises ``ValueError`` if not even the
    first passage fits.
    """

    n: int

    def __post_init__(self) -> None:
        check_count("TokenBudget", "n", self.n, 1)

    def choose(self, retrieved: Retrieved) -> list[Form]:
        """One `Form` a passage, in order."""
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
    """Fills ``n`` reader positions as well as it can with text and the compressor's ratios.

    Each passage, in order of rank, is read in the longest form that leaves room for all others in their shortest: as text,
    else by the lowest of ``ratios`` that fits. The budget is kept as with `TokenBudget`.

    Args:
        n: reader positions.
        ratios: compression ratios that the compressor was trained for, any number of them; default: the postprocessor's
            (or the compressor's own) alone.
    """

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
        """One `Form` a passage, in order."""
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


class TextBelowFidelity(Policy):
    """As another policy chooses, but passages that did not survive their compression as text.

    It needs a `nutgraf.compressors.FidelityGate`, and is what ``CompressedContextPostprocessor(fidelity=...)`` puts around
    its policy. A passage that goes back to text costs its full length, so a policy with a budget cannot stand inside.

    Args:
        threshold: passages that score less are read as text.
        policy: chooses first.

    Raises:
        ValueError: if ``policy`` has a budget.
    """

    def __init__(self, threshold: float, policy: Policy) -> None:
        if isinstance(policy, TokenBudget | AutoBudget | _score_budget()):
            raise ValueError(
                f"{policy} keeps a budget, which passages sent back to text would break; use fidelity with "
                "TextForTop, TextAbove or no policy."
            )
        self.threshold = threshold
        self.policy = policy

    def choose(self, retrieved: Retrieved) -> list[Form]:
        """One `Form` a passage, in order."""
        forms = list(self.policy.choose(retrieved))
        places = [place for place, form in enumerate(forms) if form.read == "compressed"]
        for ratio in dict.fromkeys(forms[place].ratio for place in places):  # those of a ratio together
            same = [place for place in places if forms[place].ratio == ratio]
            for place, score in zip(same, retrieved.fidelities(ratio, same)):
                if score is not None and score < self.threshold:
                    forms[place] = UNFAITHFUL
        return forms


def _shortest(policy: Policy, n: int, ratio: float | None, retrieved: Retrieved) -> tuple[list[Form], list[int]]:
    """Each passage in its shortest form, the last ones left out where not all fit; costs of those that are read."""
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
    """A policy as it was given, or made again from what `policy_to_dict` wrote; ``None``: everything is compressed.

    Raises:
        TypeError: if it is none.
    """
    if given is None:
        return TextForTop(0)
    if isinstance(given, Mapping):
        known = {kind.__name__: kind for kind in _kinds()}
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
    """A JSON-able dict of one of the policies here; of a user's own, its name alone."""
    kind = type(policy)
    settings = asdict(policy) if kind in _kinds() else {}  # type: ignore[call-overload]
    return {"policy": kind.__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}


def _kinds() -> tuple[type[Policy], ...]:
    """The policies whose settings survive JSON."""
    return (TextForTop, TextAbove, TokenBudget, AutoBudget, _score_budget())


def _score_budget() -> type[Policy]:
    from .score_budget import ScoreBudget  # which imports this module

    return ScoreBudget


def check_count(policy: str, name: str, value: Any, least: int) -> None:
    """Raises ``ValueError`` unless a policy's setting is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{policy}'s {name} must be an integer of at least {least}, got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
