"""Base of all text methods: token scores become unit values, and units become spans within an exact token budget."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..base import CompressorT, Query, TextCompressor
from ..core.blocks import find_structure
from ..core.config import check_counts, ratio_for
from ..core.hidden import hide
from ..core.passage import CompressedPassage
from ..core.structure import Structure, mean_between
from ..core.units import LEVELS, Span, carve, split_units, tokens_in, unit_scores
from ..reader.reader import Reader
from .budget import Search, join, merge, run_searches, search
from .scoring import TokenScores, self_information
from .settings import SelectionConfig, SelectionSettings

_LONGEST_WORD = 64  # characters of a word that may exceed a budget rather than be divided


@dataclass
class _Cut:
    """One text to shorten.

    Attributes:
        text, scores: the text and the scores of its tokens.
        length, target: the reader's tokens of the text, and the most of the result.
        hard: whether the result may be empty if nothing fits.
        structure: the structure of the text, if it has one.
        note: entries for ``info``.
    """

    text: str
    scores: TokenScores
    length: int
    target: int
    hard: bool
    structure: Structure | None
    note: dict[str, Any]


class SelectingCompressor(TextCompressor):
    """Scores tokens and keeps the units of text with the highest values.

    The result has at most the tokens of the budget, counted by the reader's tokenizer on the result itself:
    ``info["budget"]`` of them, of which it takes ``n_tokens``. Where these are far apart, ``info["reason"]`` says why. A text
    that fits is returned unchanged. With a ratio no text becomes empty: if nothing fits, the best word stays, and
    ``info["over_budget"]`` counts the tokens beyond the budget.

    The result equals ``joiner.join(text[a:b] for a, b in spans)``; spans have no white space at their ends. In a text with
    JSON, tables, lists or code (``info["structure"]``), members, rows, items and lines stay or go as a whole, with the brackets
    and headers that they need, and spans are joined by the text's own line breaks and commas. Nothing else marks a cut.

    What must stay (``keep``) counts against the budget; a text of which it takes more is refused.

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

    @classmethod
    def from_pretrained(cls: type[CompressorT], folder: str | Path, reader: Reader, **kwargs: Any) -> CompressorT:
        """Loads a folder written by `save_pretrained`. Settings that `with_settings` takes replace those in it."""
        given = {name: kwargs.pop(name) for name in sorted(kwargs.keys() & settable(cls.config_class))}
        compressor: Any = super().from_pretrained(folder, reader, **kwargs)  # type: ignore[misc]
        return compressor.with_settings(**given) if given else compressor

    def with_settings(self: CompressorT, **settings: Any) -> CompressorT:
        """A compressor with other settings and the same weights.

        Args:
            settings: of every text method: ``keep``, ``max_tokens``, ``ratio``, ``unit``, ...; of sentence pruners also
                ``pooled`` and ``threshold``.

        Raises:
            ValueError: if a setting is not one of them, or its value is wrong.
        """
        if unknown := sorted(settings.keys() - (known := settable(self.config_class))):
            raise ValueError(f"with_settings takes {', '.join(sorted(known))}; got {', '.join(unknown)}.")
        made = copy.copy(self)
        for cls in type(self).__mro__:
            for name in (name for name, value in vars(cls).items() if isinstance(value, cached_property)):
                made.__dict__.pop(name, None)  # made from the earlier settings
        made.config = type(self.config).from_dict({**self.config.to_dict(), **settings})
        made._fingerprint = None
        return made

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

    def compress_at(
        self, texts: Sequence[str], ratios: Sequence[float | None], query: Query = None, **options: Any
    ) -> list[list[CompressedPassage]]:
        """Compresses passages at several ratios, scoring each of them once."""
        scored: dict[tuple[str, str | None], TokenScores] = {}
        return [self.compress(texts, query, ratio, scored=scored, **options) for ratio in ratios]

    def _compress(
        self,
        texts: list[str],
        queries: list[str | None],
        ratio: float | None,
        *,
        vectors: Any,
        max_tokens: int | None = None,
        target_tokens: int | None = None,
        scored: dict[tuple[str, str | None], TokenScores] | None = None,
        **options: Any,
    ) -> list[CompressedPassage]:
        """``max_tokens``, an option of `compress`: the reader's tokens of each result, instead of a ratio.

        ``target_tokens`` is its earlier name. `compress_at` passes ``scored``, the scores of its earlier ratios.
        """
        published = self.config.mode == "published"
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        if max_tokens is not None and target_tokens is not None:
            raise ValueError("Give max_tokens or its earlier name target_tokens, not both.")
        name = "max_tokens" if target_tokens is None else "target_tokens"
        most = max_tokens if target_tokens is None else target_tokens
        if ratio is not None and most is not None:
            raise ValueError(f"Give ratio or {name}, not both (got {ratio} and {most}).")
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 0):
            raise ValueError(f"{name} must be an integer of at least 0, got {most!r}.")
        if ratio is None and most is None:
            most = self.config.max_tokens
        asked = self.config.ratio if ratio is None else ratio
        lengths = self._counts(texts)
        info: dict[str, Any] = {"method": self.config.method, "unit": self.config.unit}
        info |= {"mode": "published"} if published else {"joiner": self.config.joiner}
        info |= {"ratio_asked": float(asked)} if most is None else {"max_tokens": most}
        notes: list[dict[str, Any]] = [{} for _ in texts]
        if published:
            made = [self.as_published(t, q, asked, most) if t else ("", ()) for t, q in zip(texts, queries)]
            results = [(kept, spans, n) for (kept, spans), n in zip(made, self._counts([kept for kept, _ in made]))]
        else:
            results, notes = self._fit(texts, queries, asked, most, lengths, {} if scored is None else scored)
        return [
            CompressedPassage("text", length, self.fingerprint, text=kept, spans=spans, n_tokens=n, info=info | note)
            for length, (kept, spans, n), note in zip(lengths, results, notes)
        ]

    def _fit(
        self,
        texts: list[str],
        queries: list[str | None],
        asked: float,
        most: int | None,
        lengths: list[int],
        scored: dict[tuple[str, str | None], TokenScores],
    ) -> tuple[list[tuple[str, tuple[Span, ...], int]], list[dict[str, Any]]]:
        """Text, spans and tokens of each passage within its exact budget, and its entries for ``info``."""
        # The small term keeps 30 / 1.2 at 25 despite floating point.
        budgets = [math.floor(n / asked + 1e-9) if most is None else most for n in lengths]
        least = 1 if most is None else 0
        targets = [max(budget, min(n, least)) for budget, n in zip(budgets, lengths)]
        pooled = self.pools_budget and len(texts) > 1
        todo = [i for i, n in enumerate(lengths) if (pooled and n) or 0 < targets[i] < n]
        new = [i for i in todo if (texts[i], queries[i]) not in scored]
        made = self.score([texts[i] for i in new], [queries[i] for i in new])
        scored.update(((texts[i], queries[i]), scores) for i, scores in zip(new, made))
        found = {i: scored[texts[i], queries[i]] for i in todo}
        notes: list[dict[str, Any]] = [{} for _ in texts]
        if pooled:
            budgets, notes = self.share_budget(queries, lengths, targets, found)
            least = 0 if self.drops_passages else least
            targets = [max(budget, min(n, least)) for budget, n in zip(budgets, lengths)]
        out: list[tuple[str, tuple[Span, ...], int]] = [
            (text, ((0, len(text)),) if text else (), n) for text, n in zip(texts, lengths)
        ]
        cuts: dict[int, _Cut] = {}
        for i, (text, length, target, budget) in enumerate(zip(texts, lengths, targets, budgets)):
            notes[i]["budget"] = budget
            if not length:
                continue
            if target >= length:
                notes[i]["reason"] = f"The text has {length} tokens and room for {target}: it is left as it is."
            elif target < 1 and (must := self.config.kept_spans(text)):
                raise self._refusal(text, must, None, length, target)
            elif target < 1:
                out[i], notes[i]["reason"] = ("", (), 0), "The budget is 0 tokens."
            else:
                hard = not least
                cuts[i] = _Cut(text, found[i], length, target, hard, find_structure(text), notes[i])
        kept = run_searches([self._search(cut) for cut in cuts.values()], self._counts)
        for (i, cut), (spans, n) in zip(cuts.items(), kept):
            out[i] = (join(cut.text, spans, self.config.joiner, cut.structure), spans, n)
            if cut.structure is not None:
                cut.note["structure"] = list(cut.structure.kinds)
        for note, (_, _, n), budget in zip(notes, out, budgets):
            note |= {"over_budget": n - budget} if n > budget else {}
        return out, notes

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.reader.tokenize_batch(texts)]

    def _search(self, cut: _Cut) -> Search:
        if not bool(torch.isfinite(cut.scores.nll).all()):
            raise ValueError("The scoring model gave NaN or infinite scores; load it in float32 or bfloat16.")
        must = self.config.kept_spans(cut.text)
        finest = min(LEVELS.index(self.level), LEVELS.index("word"))
        while True:
            # If no unit fits, use finer ones: half of a long sentence is better than nothing.
            for level in reversed(LEVELS[finest : LEVELS.index(self.level) + 1]):
                found = yield from self._search_level(cut, level, must)
                if _says(join(cut.text, found[0], self.config.joiner, cut.structure)):
                    return found
            if must:
                if not found[0]:
                    raise self._refusal(cut.text, must, cut.structure, cut.length, cut.target)
                return found
            if cut.structure is None:
                return (yield from self._best_word(cut))
            if cut.structure.root is not None:
                return (yield from self._bare_root(cut, cut.structure, cut.structure.root))
            kinds = " or ".join(cut.structure.kinds)
            cut.note["reason"] = f"No whole part of the {kinds} fits into {cut.target} tokens: it is cut like prose."
            cut.structure = None

    def _best_word(self, cut: _Cut) -> Search:
        """The best word, even if it is too long; of text without words, tokens."""
        text, target = cut.text, cut.target
        units, order, _, _ = self._ranked(cut, "word", [])
        trimmed = [spans for i in order if (spans := merge(text, [units[i]]))]
        best = [spans for spans in trimmed if _says(join(text, spans))] or trimmed
        sizes = yield [join(text, spans) for spans in best]
        if fits := next(((spans, n) for spans, n in zip(best, sizes) if n <= target), None):
            return fits
        data = not best or best[0][0][1] - best[0][0][0] > _LONGEST_WORD
        if cut.hard or data or self.level == "token":
            found = yield from self._search_level(cut, "token", [])
            if found[0] or cut.hard or not best:
                if not found[0]:
                    cut.note["reason"] = f"Not even one word fits into {target} tokens."
                return found
        cut.note["reason"] = f"Not even one word fits into {target} tokens: the best one stays."
        return (best[0], sizes[0]) if sizes[0] < cut.length else (((0, len(text)),), cut.length)

    def _bare_root(self, cut: _Cut, structure: Structure, root: int) -> Search:
        """The outer brackets alone, if no member fits."""
        part = structure.parts[root]
        spans = structure.merge([((part.start, part.end), root)])
        (n,) = yield [structure.join(spans, self.config.joiner)]
        cut.note["reason"] = f"No member fits into {cut.target} tokens: the brackets stay, so that the result is JSON."
        return ((), 0) if cut.hard and n > cut.target else (spans, n)

    def _refusal(
        self, text: str, must: Sequence[Span], structure: Structure | None, length: int, target: int
    ) -> ValueError:
        spans = merge(text, must)
        if structure is not None:
            widened = [((a, b), structure.part_at(a)) for a, b in structure.widen(must)]
            spans = structure.merge(widened)
        (n,) = self._counts([join(text, spans, self.config.joiner, structure)])
        return ValueError(
            f"What must stay takes {n} of the {length} tokens of {text[:40]!r}..., and the budget is {target}; ask for "
            f"ratio {ratio_for(length, n)} or less, for max_tokens {n} or more, or keep fewer words (keep, keep_patterns, "
            "keep_digits, keep_names)."
        )

    def _search_level(self, cut: _Cut, level: str, must: Sequence[Span]) -> Search:
        units, order, first, owners = self._ranked(cut, level, must)
        sizes = tokens_in(units, cut.scores.offsets)
        joiner, structure = self.config.joiner, cut.structure
        return (
            yield from search(
                cut.text, units, order, cut.target, cut.length, sizes, joiner, first, structure=structure, owners=owners
            )
        )

    def _ranked(self, cut: _Cut, level: str, must: Sequence[Span]) -> tuple[list[Span], list[int], int, list[int]]:
        """Units, their indices by value, how many at the front must stay, and the parts of the structure that they are in."""
        text, scores, structure = cut.text, cut.scores, cut.structure
        units = split_units(text, level, scores.offsets)
        if structure is not None:
            units, must = structure.refine(units), structure.widen(must)
        values = self.unit_values(units, scores).double().numpy()
        marks, owners = [False] * len(units), list[int]()
        if must:
            units, parents, marks = carve(units, must, text)
            values = values[parents]
        if structure is not None:
            fine = units
            units, owners, marks = structure.units(fine, marks)
            values = np.array(mean_between(fine, values.tolist(), units))
        # Stable: the first of equal values first.
        stay = np.array(marks, dtype=bool)
        return units, np.lexsort((-values, ~stay)).tolist(), int(stay.sum()), owners


_SHARED = frozenset(f.name for f in fields(SelectionSettings))
_FREE = frozenset({"pooled", "threshold"})  # settings of some methods that training does not depend on


def settable(config: Any) -> frozenset[str]:
    """Names of a config class's settings that may differ from those of training."""
    return _SHARED | (_FREE & {f.name for f in fields(config)})


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


def find_scorer(config: ScorerSettings, reader: Reader) -> Reader:
    """The causal LM that a config names, on the reader's device; without a name the reader itself."""
    return reader if config.scorer is None else Reader.from_pretrained(config.scorer, device=reader.device)


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
        hide(self, "scorer", scorer or find_scorer(config, reader))

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The loss in nats of each token (of the scorer); ``queries`` are ignored."""
        return self_information(self.scorer, texts, window=self.config.window)

    def identity_parts(self) -> list[Any]:
        """Reader and scorer."""
        return [*super().identity_parts(), self.scorer.fingerprint]
