"""What all text compressors share: token scores become units, units become spans within an exact token budget."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..base import TextCompressor
from ..core.config import CompressorConfig
from ..core.passage import CompressedPassage
from ..core.units import LEVELS, Span, carve, keep_spans, split_units, tokens_in, unit_scores
from .budget import Search, join, run_searches, search
from .scoring import TokenScores


@dataclass
class SelectionConfig(CompressorConfig):
    """Settings of every method that keeps parts of the text."""

    method: ClassVar[str]

    ratio: float = field(default=2.0, metadata={"help": "compression ratio where no budget is given"})
    unit: str = field(default="phrase", metadata={"help": f"what is kept or dropped whole: one of {', '.join(LEVELS)}"})
    keep: tuple[str, ...] = field(default=(), metadata={"help": "strings that stay as long as they fit"})
    keep_patterns: tuple[str, ...] = field(default=(), metadata={"help": "regular expressions whose matches stay"})
    keep_digits: bool = field(default=False, metadata={"help": "numbers stay as long as they fit"})
    keep_names: bool = field(default=False, metadata={"help": "capitalised names stay as long as they fit"})
    joiner: str = field(default=" ", metadata={"help": "what stands between kept spans that do not touch"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(
                f"ratio is source tokens per kept token and must be a finite number of at least 1, got {self.ratio!r}."
            )
        if self.unit not in LEVELS:
            raise ValueError(f"unit must be one of {LEVELS}, got {self.unit!r}.")
        for name in ("keep", "keep_patterns"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} must be a list of strings that are not empty, got {value!r}.")
            setattr(self, name, tuple(value))
        for pattern in self.keep_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"keep_patterns holds {pattern!r}, which is no regular expression: {error}."
                ) from error


class SelectingCompressor(TextCompressor):
    """A compressor that scores tokens and keeps the units of text with the highest mean scores.

    The result has at most the tokens that the budget allows, counted by the reader's tokenizer on the result itself. Kept
    spans are joined by ``config.joiner`` where they do not touch, so ``joiner.join(text[a:b] for a, b in spans)`` is the
    compressed text. White space at the ends of a span is dropped, and a text that already fits is returned as it is.

    A method implements `score`.
    """

    config: SelectionConfig

    @abstractmethod
    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """Scores every token of every text: the higher, the more it is worth keeping."""

    def identity_parts(self) -> list[Any]:
        """The reader's tokens decide what fits."""
        return [self.reader.fingerprint]

    @property
    def level(self) -> str:
        """The units that are kept or dropped whole, one of `LEVELS`."""
        return self.config.unit

    def unit_values(self, units: Sequence[Span], scores: TokenScores) -> Tensor:
        """``[units]`` what each unit is worth: the mean of its tokens' scores."""
        return unit_scores(units, scores.offsets, scores.nll)

    @property
    def pools_budget(self) -> bool:
        """Whether the passages of one call share one budget, which `share_budget` divides."""
        return False

    def share_budget(
        self,
        texts: Sequence[str],
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Moves budget between the passages of a call.

        Args:
            texts, queries: the passages and their questions.
            lengths: the reader's tokens of each passage.
            targets: the tokens that each would have on its own.
            found: scores by index of every passage that is not empty.

        Returns:
            New targets with the same sum, and for each passage what to say of it in ``info``.
        """
        return list(targets), [{} for _ in texts]

    def _compress(
        self,
        texts: list[str],
        queries: list[str | None],
        ratio: float | None,
        *,
        vectors: Any,
        target_tokens: int | None = None,
        with_scores: bool = False,
        **options: Any,
    ) -> list[CompressedPassage]:
        """The options of `compress`.

        Args:
            target_tokens: the reader's tokens that each result may have, in place of a ratio; 0 keeps nothing.
            with_scores: put each token's score and characters into ``info["scores"]`` and ``info["offsets"]``.
        """
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        if ratio is not None and target_tokens is not None:
            raise ValueError(f"Give ratio or target_tokens, not both (got {ratio} and {target_tokens}).")
        if target_tokens is not None and (not isinstance(target_tokens, int) or target_tokens < 0):
            raise ValueError(f"target_tokens must be an integer of at least 0, got {target_tokens!r}.")
        asked = self.config.ratio if ratio is None else ratio
        lengths = [len(ids) for ids in self.reader.tokenize_batch(texts)]
        # The small term keeps 30 / 1.2 at 25 in spite of floating point.
        targets = [math.floor(n / asked + 1e-9) if target_tokens is None else target_tokens for n in lengths]
        pooled = self.pools_budget and len(texts) > 1
        todo = [i for i, n in enumerate(lengths) if with_scores or (pooled and n) or 0 < targets[i] < n]
        found = dict(zip(todo, self.score([texts[i] for i in todo], [queries[i] for i in todo])))
        notes: list[dict[str, Any]] = [{} for _ in texts]
        if pooled:
            targets, notes = self.share_budget(texts, queries, lengths, targets, found)
        info: dict[str, Any] = {"method": self.config.method, "unit": self.config.unit, "joiner": self.config.joiner}
        info |= {"ratio_asked": float(asked)} if target_tokens is None else {"target_tokens": target_tokens}
        chosen: list[tuple[tuple[Span, ...], int]] = [
            (((0, len(text)),) if text else (), length) if length <= target else ((), 0)
            for text, length, target in zip(texts, lengths, targets)
        ]
        cut = [i for i, (length, target) in enumerate(zip(lengths, targets)) if 0 < target < length]
        searches = [self._search(texts[i], found[i], targets[i], lengths[i]) for i in cut]
        for i, kept in zip(cut, run_searches(searches, self._counts)):
            chosen[i] = kept
        passages = []
        for i, (text, length, (spans, n)) in enumerate(zip(texts, lengths, chosen)):
            extra = {"scores": found[i].nll.tolist(), "offsets": found[i].offsets} if with_scores else {}
            passages.append(
                CompressedPassage(
                    "text",
                    length,
                    self.fingerprint,
                    text=join(text, spans, self.config.joiner),
                    spans=spans,
                    n_tokens=n,
                    info=info | notes[i] | extra,
                )
            )
        return passages

    def _counts(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.reader.tokenize_batch(texts)]

    def _count(self, text: str) -> int:
        return len(self.reader.tokenize(text))

    def _search(self, text: str, scores: TokenScores, target: int, length: int) -> Search:
        if not bool(torch.isfinite(scores.nll).all()):
            raise ValueError("The scoring model gave NaN or infinite scores; load it in float32 or bfloat16.")
        config = self.config
        must_stay = keep_spans(text, config.keep, config.keep_patterns, config.keep_digits, config.keep_names)
        # Where not one unit fits, finer ones are taken: half of a long sentence tells more than nothing.
        for level in reversed(LEVELS[: LEVELS.index(self.level) + 1]):
            units = split_units(text, level, scores.offsets)
            values = self.unit_values(units, scores).double().numpy()
            must = np.zeros(len(units), dtype=bool)
            if must_stay:
                units, parents, marks = carve(units, must_stay, text)
                values, must = values[parents], np.array(marks)
            order = np.lexsort((-values, ~must)).tolist()  # the first of equals first
            sizes = tokens_in(units, scores.offsets)
            found = yield from search(text, units, order, target, length, sizes, config.joiner, first=int(must.sum()))
            if found[0]:
                return found
        return (), 0
