"""Base of sentence pruners: sentences compete for a question, and words fill what is left of the budget."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.units import Span, split_units, unit_scores
from .budget import join, merge, share_out
from .scoring import TokenScores
from .selection import SelectingCompressor, SelectionConfig

_WITHIN = 1e-9  # weight of a word's value, so small that it never outweighs a sentence's (float64)


@dataclass(frozen=True, eq=False)
class SentenceScores:
    """Scores of a text's sentences.

    Attributes:
        spans: ``(start, end)`` characters of each sentence; they cover the text without gaps.
        values: ``[sentences]`` float32 on the CPU; the highest stay.
        words: values of the text's tokens, to choose among the words of a sentence that fits only in part. Default: the
            first words stay.
    """

    spans: list[Span]
    values: Tensor
    words: TokenScores | None = None


@dataclass(frozen=True)
class PruneExample:
    """A training example of a pruner.

    Attributes:
        question, passage: the texts.
        sentences: ``(start, end)`` characters of each sentence.
        values: how much each sentence is worth, from 0 to 1; ``None`` if unknown.
        words: ``(start, end)`` characters of each word.
        kept: 1 (keep) or 0 for each word.
    """

    question: str
    passage: str
    sentences: tuple[Span, ...]
    values: tuple[float | None, ...]
    words: tuple[Span, ...] = ()
    kept: tuple[int, ...] = ()


@dataclass
class PrunerConfig(SelectionConfig):
    """Base config of sentence pruners. ``unpublished`` says why mode 'published' is not available; empty: it is."""

    method: ClassVar[str]
    unpublished: ClassVar[str] = ""

    unit: str = field(
        default="word",
        metadata={"help": "'word' fills the budget with words of the next sentence; 'sentence' does not"},
    )
    pooled: bool = field(
        default=False,
        metadata={"help": "the passages of a call for one question share their budget; a useless one becomes empty"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pooled, bool):
            raise ValueError(f"pooled must be true or false, got {self.pooled!r}.")
        if self.pooled and self.keeps:
            raise ValueError(
                "pooled and keep exclude each other: a shared budget may leave a passage less than what must stay; set "
                "pooled to false, or leave out keep, keep_patterns, keep_digits and keep_names."
            )
        if self.pooled and self.mode == "published":
            raise ValueError("pooled shares an exact budget, and mode='published' has none; use mode='fast'.")
        if self.unpublished:
            check_no_published(self, self.unpublished)


@dataclass(kw_only=True)
class ThresholdSettings:
    """Config mixin of pruners whose published form keeps the sentences above a threshold."""

    threshold: float = field(default=0.5, metadata={"help": "mode 'published': sentences with a higher score stay"})

    def check_threshold(self) -> None:
        """Raises ``ValueError`` unless the threshold is a number."""
        if not isinstance(self.threshold, int | float) or self.threshold != self.threshold:
            raise ValueError(f"threshold must be a number, got {self.threshold!r}.")


class SentencePruner(SelectingCompressor):
    """Keeps the sentences that a question needs.

    ``mode="fast"``: the best sentences within an exact budget in the reader's tokens. The words of the next sentence fill the
    rest. With ``pooled`` the sentences of all passages for one question compete.

    ``mode="published"``, where the method has it: the sentences above ``threshold``. There is no budget then, and a passage
    may become empty.

    A method implements `score_sentences`.
    """

    config: PrunerConfig
    query_aware: bool = True

    @abstractmethod
    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """Scores each sentence of each text for its question."""

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The score of each token: its sentence's, plus a small term for the order of words inside the sentence."""
        asked = list(queries or [None] * len(texts))
        self.check_questions(asked)
        return [token_values(text, found) for text, found in zip(texts, self.score_sentences(texts, asked))]

    def check_questions(self, queries: Sequence[str | None]) -> None:
        """Raises ``ValueError`` if a question is missing."""
        if self.query_aware and any(query is None or not query.strip() for query in queries):
            raise ValueError(
                f"{self.config.title or self.config.method} keeps sentences for a question and got none; pass query=...."
            )

    @property
    def pools_budget(self) -> bool:
        """Whether the passages of a call share their budget."""
        return self.config.pooled

    @property
    def drops_passages(self) -> bool:
        """A passage without a needed sentence becomes empty."""
        return True

    def share_budget(
        self,
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Gives each passage the room that its tokens win against those of the other passages for the same question."""
        groups: dict[str | None, list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            if lengths[i]:
                groups[query].append(i)
        out = list(targets)
        for group in groups.values():
            total, length = sum(targets[i] for i in group), sum(lengths[i] for i in group)
            values = torch.cat([found[i].nll for i in group])
            sizes = [len(found[i].nll) for i in group]
            if not len(values):
                continue
            # The scorer's tokens stand for the reader's.
            best = torch.zeros(len(values))
            best[values.argsort(descending=True, stable=True)[: round(len(values) * total / length)]] = 1
            won = [float(part.sum()) * lengths[i] / max(len(part), 1) for i, part in zip(group, best.split(sizes))]
            shares = share_out(total, won, [lengths[i] for i in group])
            for i, share in zip(group, shares):
                out[i] = share
        return out, [{} for _ in targets]

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The sentences above the threshold; ``ratio`` has no effect."""
        if target_tokens is not None:
            raise TypeError("mode='published' keeps the sentences above a threshold and takes no max_tokens.")
        self.check_questions([query])
        threshold: float = self.config.threshold  # type: ignore[attr-defined]
        (found,) = self.score_sentences([text], [query])
        kept = [span for span, value in zip(found.spans, found.values.tolist()) if value > threshold]
        spans = merge(text, kept)
        return join(text, spans, self.config.joiner), spans


class TrainedPruner(SentencePruner):
    """A pruner with weights that a recipe of kind `sentences` trains."""

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Copies the tensors of another compressor that have the same name and shape; returns their names."""
        own = self.trainable_state()
        shared = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
        with torch.no_grad():
            for name in shared:
                own[name].copy_(weights[name])
        return shared

    @abstractmethod
    def loss(self, examples: Sequence[PruneExample]) -> dict[str, Tensor]:
        """Mean ``loss`` of a batch, and parts of it to log."""


def sentence_spans(text: str) -> list[Span]:
    """``(start, end)`` characters of the sentences of a text, without gaps."""
    return split_units(text, "sentence")


def token_values(text: str, found: SentenceScores) -> TokenScores:
    """float64 values of tokens: the sentence's, and within it the word's; without word scores earlier words are worth more."""
    words = found.words
    if words is None:
        offsets = split_units(text, "word")
        words = TokenScores([], offsets, -torch.arange(len(offsets), dtype=torch.float64))
    inside = sentence_index([a for a, _ in words.offsets], found.spans)
    values = words.nll.double()
    if len(inside):
        values = found.values.double()[inside] + _WITHIN * values
    return TokenScores(words.ids, words.offsets, values)


def sentence_index(starts: Sequence[int], spans: Sequence[Span]) -> Tensor:
    """``[starts]`` index of the sentence that each character lies in."""
    borders = torch.tensor([a for a, _ in spans], dtype=torch.long)
    return torch.searchsorted(borders, torch.tensor(starts, dtype=torch.long), right=True) - 1


def sentence_means(spans: Sequence[Span], tokens: TokenScores) -> Tensor:
    """``[sentences]`` float32 mean value of each sentence's tokens."""
    return unit_scores(spans, tokens.offsets, tokens.nll).float()


def means_in(values: Tensor, offsets: Sequence[Span], units: Sequence[Span]) -> Tensor:
    """``[units]`` mean value of the tokens that begin in each unit; 0 for one without tokens. Differentiable.

    A head that is linear gives the same for the mean of the states as for the mean of the logits.
    """
    inside = sentence_index([a for a, _ in offsets], units).to(values.device)
    total = values.new_zeros(len(units)).index_add(0, inside, values)
    return total / torch.bincount(inside, minlength=len(units)).clamp(min=1)


def check_no_published(config: SelectionConfig, why: str) -> None:
    """Raises ``ValueError`` for mode 'published' of a method whose paper has no algorithm of that kind."""
    if config.mode == "published":
        raise ValueError(f"mode='published' is not available for {config.method}: {why}; use mode='fast'.")
