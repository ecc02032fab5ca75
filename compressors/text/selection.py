"""Base of all text methods: token scores become unit values, and units become spans within an exact token budget."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..base import TextCompressor
from ..core.config import CompressorConfig, ConfigT, check_choices, check_counts, check_ratio
from ..core.hidden import hide
from ..core.keep import KeepSettings
from ..core.passage import CompressedPassage
from ..core.units import LEVELS, Span, carve, split_units, tokens_in, unit_scores
from ..reader.reader import Reader
from .budget import Search, join, merge, run_searches, search
from .scoring import TokenScores, self_information

MODES = ("fast", "published")
_LONGEST_WORD = 64  # characters of a word that may exceed a budget rather than be divided
_OLD_NAME = "faithful"  # of mode "published" in older configs, and in fingerprints


@dataclass(kw_only=True)
class SelectionSettings(KeepSettings):
    """Config mixin of every text method: the budget, the units, and what must stay."""

    ratio: float = field(default=2.0, metadata={"help": "compression ratio if a call gives no budget"})
    unit: str = field(default="phrase", metadata={"help": f"kept or dropped as a whole: one of {', '.join(LEVELS)}"})
    joiner: str = field(default=" ", metadata={"help": "text between kept spans that do not touch"})
    mode: Literal["fast", "published"] = field(
        default="fast",
        metadata={"help": "'fast': exact budget; 'published': the released algorithm ('faithful' in older configs)"},
    )


@dataclass
class SelectionConfig(SelectionSettings, CompressorConfig):
    """Base config of text methods.

    Options of ``mode="published"`` alone are in a field ``published`` of the class `options_class`. `from_dict` and
    `to_dict` hold them flat, beside the other settings.
    """

    method: ClassVar[str]
    cost: ClassVar[str] = "scores"
    options_class: ClassVar[type[CompressorConfig] | None] = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "source tokens per kept token")
        if self.mode == _OLD_NAME:
            self.mode = "published"
        check_choices(self, {"unit": LEVELS, "mode": MODES})
        self.check_keep()

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-able dict for `from_dict`."""
        found = super().to_dict()
        options = found.pop("published", None)
        return found if options is None else found | self.published.to_dict()  # type: ignore[attr-defined]

    def identity(self) -> dict[str, Any]:
        """What the fingerprint hashes."""
        return super().identity() | ({"mode": _OLD_NAME} if self.mode == "published" else {})

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Builds the config; raises ``ValueError`` for unknown keys."""
        options_class = cls.options_class  # type: ignore[attr-defined]
        if options_class is not None and isinstance(data, Mapping):
            names = {f.name for f in fields(options_class)}
            flat = {name: value for name, value in data.items() if name in names}
            given = data.get("published", {})
            given = given.to_dict() if isinstance(given, options_class) else given
            if not isinstance(given, Mapping):
                raise ValueError(f"published holds options by name, got a {type(given).__name__}.")
            options = options_class.from_dict({**given, **flat})
            data = {**{name: value for name, value in data.items() if name not in names}, "published": options}
        return super().from_dict(data)  # type: ignore[misc]


class SelectingCompressor(TextCompressor):
    """Scores tokens and keeps the units of text with the highest values.

    The result has at most the tokens of the budget, counted by the reader's tokenizer on the result itself. It equals
    ``joiner.join(text[a:b] for a, b in spans)``; spans have no white space at their ends. A text that fits is returned
    unchanged. With a ratio no text becomes empty: if nothing fits, the best word stays, and ``info["over_budget"]`` counts
    the tokens beyond the budget.

    A method implements `score`, and `as_published` if it knows ``mode="published"``.
    """

    config: SelectionConfig

    @abstractmethod
    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """Scores each token of each text: a higher score is kept first."""

    @abstractmethod
    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The released algorithm on one passage: its text, and its spans if they are known."""

    def identity_parts(self) -> list[Any]:
        """The reader's tokens decide what fits."""
        return [self.reader.fingerprint]

    @property
    def level(self) -> str:
        """The units that are kept or dropped, one of `LEVELS`."""
        return self.config.unit

    def unit_values(self, units: Sequence[Span], scores: TokenScores) -> Tensor:
        """``[units]`` values: the mean score of each unit's tokens."""
        return unit_scores(units, scores.offsets, scores.nll)

    @property
    def pools_budget(self) -> bool:
        """Whether `share_budget` divides the budget of a call between its passages."""
        return False

    @property
    def drops_passages(self) -> bool:
        """Whether a shared budget may leave a passage empty."""
        return False

    def share_budget(
        self,
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Moves budget between the passages of a call.

        Args:
            queries: the question of each passage.
            lengths: the reader's tokens of each passage.
            targets: the budget that each passage has alone.
            found: scores by index of each passage that is not empty.

        Returns:
            New targets with the same sum, and each passage's entries for ``info``.
        """
        return list(targets), [{} for _ in targets]

    def _compress(
        self,
        texts: list[str],
        queries: list[str | None],
        ratio: float | None,
        *,
        vectors: Any,
        target_tokens: int | None = None,
        **options: Any,
    ) -> list[CompressedPassage]:
        """``target_tokens``, an option of `compress`: the reader's tokens of each result, instead of a ratio."""
        published = self.config.mode == "published"
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        if ratio is not None and target_tokens is not None:
            raise ValueError(f"Give ratio or target_tokens, not both (got {ratio} and {target_tokens}).")
        if target_tokens is not None and (not isinstance(target_tokens, int) or target_tokens < 0):
            raise ValueError(f"target_tokens must be an integer of at least 0, got {target_tokens!r}.")
        asked = self.config.ratio if ratio is None else ratio
        lengths = self._counts(texts)
        info: dict[str, Any] = {"method": self.config.method, "unit": self.config.unit}
        info |= {"mode": "published"} if published else {"joiner": self.config.joiner}
        info |= {"ratio_asked": float(asked)} if target_tokens is None else {"target_tokens": target_tokens}
        notes: list[dict[str, Any]] = [{} for _ in texts]
        if published:
            made = [self.as_published(t, q, asked, target_tokens) if t else ("", ()) for t, q in zip(texts, queries)]
            results = [(kept, spans, n) for (kept, spans), n in zip(made, self._counts([kept for kept, _ in made]))]
        else:
            results, notes = self._fit(texts, queries, asked, target_tokens, lengths)
        return [
            CompressedPassage("text", length, self.fingerprint, text=kept, spans=spans, n_tokens=n, info=info | note)
            for length, (kept, spans, n), note in zip(lengths, results, notes)
        ]

    def _fit(
        self,
        texts: list[str],
        queries: list[str | None],
        asked: float,
        target_tokens: int | None,
        lengths: list[int],
    ) -> tuple[list[tuple[str, tuple[Span, ...], int]], list[dict[str, Any]]]:
        """Text, spans and tokens of each passage within its exact budget, and its entries for ``info``."""
        # The small term keeps 30 / 1.2 at 25 despite floating point.
        budgets = [math.floor(n / asked + 1e-9) if target_tokens is None else target_tokens for n in lengths]
        least = 1 if target_tokens is None else 0
        targets = [max(budget, min(n, least)) for budget, n in zip(budgets, lengths)]
        pooled = self.pools_budget and len(texts) > 1
        todo = [i for i, n in enumerate(lengths) if (pooled and n) or 0 < targets[i] < n]
        found = dict(zip(todo, self.score([texts[i] for i in todo], [queries[i] for i in todo])))
        notes: list[dict[str, Any]] = [{} for _ in texts]
        if pooled:
            budgets, notes = self.share_budget(queries, lengths, targets, found)
            least = 0 if self.drops_passages else least
            targets = [max(budget, min(n, least)) for budget, n in zip(budgets, lengths)]
        chosen: list[tuple[tuple[Span, ...], int]] = [
            (((0, len(text)),) if text else (), length) if length <= target else ((), 0)
            for text, length, target in zip(texts, lengths, targets)
        ]
        cut = [i for i, (length, target) in enumerate(zip(lengths, targets)) if 0 < target < length]
        searches = [self._search(texts[i], found[i], targets[i], lengths[i], hard=not least) for i in cut]
        for i, kept in zip(cut, run_searches(searches, self._counts)):
            chosen[i] = kept
        notes = [
            note | ({"over_budget": n - budget} if n > budget else {})
            for note, (_, n), budget in zip(notes, chosen, budgets)
        ]
        return [(join(t, spans, self.config.joiner), spans, n) for t, (spans, n) in zip(texts, chosen)], notes

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.reader.tokenize_batch(texts)]

    def _search(self, text: str, scores: TokenScores, target: int, length: int, hard: bool) -> Search:
        if not bool(torch.isfinite(scores.nll).all()):
            raise ValueError("The scoring model gave NaN or infinite scores; load it in float32 or bfloat16.")
        must_stay = self.config.kept_spans(text)
        finest = min(LEVELS.index(self.level), LEVELS.index("word"))
        # If no unit fits, use finer ones: half of a long sentence is better than nothing. Last, forget what must stay.
        for kept in (must_stay, []) if must_stay else ([],):
            for level in reversed(LEVELS[finest : LEVELS.index(self.level) + 1]):
                found = yield from self._search_level(text, scores, target, length, level, kept)
                if _says(join(text, found[0])):
                    return found
        units, order, _ = self._ranked(text, scores, "word", [])
        order.sort(key=lambda i: not any(a < units[i][1] and units[i][0] < b for a, b in must_stay))
        trimmed = [spans for i in order if (spans := merge(text, [units[i]]))]
        best = [spans for spans in trimmed if _says(join(text, spans))] or trimmed
        sizes = yield [join(text, spans) for spans in best]
        if fits := next(((spans, n) for spans, n in zip(best, sizes) if n <= target), None):
            return fits
        data = not best or best[0][0][1] - best[0][0][0] > _LONGEST_WORD
        if hard or data or self.level == "token":
            found = yield from self._search_level(text, scores, target, length, "token", [])
            if found[0] or hard or not best:
                return found
        return (best[0], sizes[0]) if sizes[0] < length else (((0, len(text)),), length)

    def _search_level(
        self, text: str, scores: TokenScores, target: int, length: int, level: str, must_stay: Sequence[Span]
    ) -> Search:
        units, order, first = self._ranked(text, scores, level, must_stay)
        sizes = tokens_in(units, scores.offsets)
        return (yield from search(text, units, order, target, length, sizes, self.config.joiner, first=first))

    def _ranked(
        self, text: str, scores: TokenScores, level: str, must_stay: Sequence[Span]
    ) -> tuple[list[Span], list[int], int]:
        """Units, their indices by value, and how many at the front must stay."""
        units = split_units(text, level, scores.offsets)
        values = self.unit_values(units, scores).double().numpy()
        must = np.zeros(len(units), dtype=bool)
        if must_stay:
            units, parents, marks = carve(units, must_stay, text)
            values, must = values[parents], np.array(marks)
        # Stable: the first of equal values first.
        return units, np.lexsort((-values, ~must)).tolist(), int(must.sum())


def _says(text: str) -> bool:
    """Whether a text has a letter or digit."""
    return any(map(str.isalnum, text))


@dataclass(kw_only=True)
class ScorerSettings:
    """Config mixin of text methods that score tokens with a causal LM."""

    scorer: str | None = field(
        default=None, metadata={"help": "hub id or folder of the causal LM that scores; default: the reader"}
    )
    window: int = field(default=2048, metadata={"help": "longest stretch of text that the scorer reads at once (fast)"})


@dataclass
class LMSelectionConfig(ScorerSettings, SelectionConfig):
    """Base config of text methods that score tokens with a causal LM."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"window": 2})


class LMSelectingCompressor(SelectingCompressor):
    """A selecting compressor that scores tokens with a causal LM.

    Args:
        config: the settings.
        reader: the reader; the budget counts its tokens.
        scorer: the causal LM that scores, instead of loading ``config.scorer``.

    Attributes:
        scorer: the causal LM that scores.
    """

    training_free = True
    config: LMSelectionConfig
    scorer: Reader

    def __init__(self, config: LMSelectionConfig, reader: Reader, *, scorer: Reader | None = None) -> None:
        super().__init__(config, reader)
        if scorer is None:
            scorer = reader if config.scorer is None else Reader.from_pretrained(config.scorer, device=reader.device)
        hide(self, "scorer", scorer)

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The loss in nats of each token (of the scorer); ``queries`` are ignored."""
        return self_information(self.scorer, texts, window=self.config.window)

    def identity_parts(self) -> list[Any]:
        """Reader and scorer."""
        return [*super().identity_parts(), self.scorer.fingerprint]
