"""LongLLMLingua: keeps the tokens and passages that matter for a question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.config import CompressorConfig
from ..core.passage import CompressedPassage
from ..registry import register_compressor
from .budget import share_out
from .llmlingua import LLMLinguaCompressor, LLMLinguaConfig
from .published.llmlingua import STATEMENT, LongLLMLinguaOptions, reordered
from .scoring import BLANK_LINE, TokenScores, self_information


@dataclass
class LongLLMLinguaConfig(LLMLinguaConfig):
    """Settings of LongLLMLingua. ``dynamic_ratio`` is 0 by default; the paper's examples use 0.25 to 0.3."""

    method: ClassVar[str] = "longllmlingua"
    title: ClassVar[str] = "LongLLMLingua"
    cost: ClassVar[str] = "contrast"
    options_class: ClassVar[type[CompressorConfig] | None] = LongLLMLinguaOptions
    retired: ClassVar[dict[str, Any]] = {**LLMLinguaConfig.retired, "statement": STATEMENT}

    question: str | None = field(default=None, metadata={"help": "question for calls without one: a fixed task, say"})
    published: LongLLMLinguaOptions = field(
        default_factory=LongLLMLinguaOptions, kw_only=True, metadata={"help": "options of mode 'published' alone"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question is not None and not self.question.strip():
            raise ValueError("question must be a text, or null if each call gives one; got an empty one.")


@register_compressor
class LongLLMLinguaCompressor(LLMLinguaCompressor):
    """Keeps the tokens that a question makes more likely (LongLLMLingua, arXiv 2310.06839).

    A token's score is its contrastive perplexity, ``-log p(token | before) + log p(token | question, before)``.

    ``mode="fast"``: one pass per term, and an exact budget per passage. With ``dynamic_ratio`` r above 0 the passages of a
    call with the same question are ranked by the question's loss after each passage (from the pass without a prefix).
    Their keep ratios run from +r to -r around the common one, with the same total. Results stay in the caller's order;
    ``info["rank"]`` holds the rank (0 is best), and `reorder` sorts by it.

    ``mode="published"``: the released algorithm, passage by passage; `compress_prompt` runs it on several contexts.

    Each call needs a question unless the config has one.
    """

    config_class: ClassVar[type[CompressorConfig]] = LongLLMLinguaConfig
    config: LongLLMLinguaConfig
    query_aware: bool = True

    def _question(self, query: str | None) -> str:
        found = query if query is not None and query.strip() else self.config.question
        if found is None:
            raise ValueError(
                "LongLLMLingua compresses for a question but got none: pass query=..., set the config's question, or use "
                "llmlingua, which needs none."
            )
        return found

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The contrastive perplexity in nats of each token (of the scorer).

        Args:
            texts: the texts.
            queries: one question per text.

        Raises:
            ValueError: if a text has no question.
        """
        questions = [self._question(query) for query in queries or [None] * len(texts)]
        alone = self._alone(texts, questions if self.config.dynamic_ratio else None)
        prefixes = [question + BLANK_LINE for question in questions]
        asked = self_information(self.scorer, texts, prefixes=prefixes, window=self.config.window)
        return [TokenScores(a.ids, a.offsets, a.nll - b.nll, a.ending) for a, b in zip(alone, asked)]

    def _alone(self, texts: Sequence[str], questions: Sequence[str] | None) -> list[TokenScores]:
        """Losses without a question; given questions, also the loss of each question after its text, in the same pass."""
        endings = None if questions is None else [question + STATEMENT for question in questions]
        return self_information(self.scorer, texts, endings=endings, window=self.config.window)

    def rank(self, texts: Sequence[str], query: str | None = None) -> list[int]:
        """Indices of passages by ascending `rank_losses`; ties keep the caller's order."""
        losses = self.rank_losses(texts, query)
        return sorted(range(len(losses)), key=lambda i: losses[i])

    def rank_losses(self, texts: Sequence[str], query: str | None = None) -> list[float]:
        """Mean loss in nats of the question and a statement after each passage: lower is more relevant.

        A passage longer than the scorer's window counts by its best window. An empty passage has an infinite loss.

        Raises:
            ValueError: without a question.
        """
        question = self._question(query)
        with self._lock, torch.no_grad():
            found = self._alone(self._check_texts(texts), [question] * len(texts))
        return [math.inf if scores.ending is None else scores.ending for scores in found]

    @property
    def pools_budget(self) -> bool:
        """Dynamic ratios divide the budget of a call."""
        return self.config.dynamic_ratio > 0

    def share_budget(
        self,
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Targets by rank among the passages with the same question: the published ramp, scaled to the same total."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            groups[self._question(query)].append(i)
        out = list(targets)
        notes: list[dict[str, Any]] = [{} for _ in lengths]
        for group in groups.values():
            losses = {i: found[i].ending if i in found else None for i in group}  # empty passages have none
            order = sorted(group, key=lambda i: math.inf if (loss := losses[i]) is None else loss)
            weights, caps, total = [], [], 0
            for rank, i in enumerate(order):
                notes[i] = {"rank": rank}
                shift = self.config.dynamic_ratio * (1 - 2 * rank / (len(order) - 1)) if len(order) > 1 else 0.0
                rate = min(targets[i] / lengths[i], 1.0) if lengths[i] else 0.0
                # A passage with target 0 must stay at 0 despite the ramp.
                weights.append(lengths[i] * min(max(rate + shift, 0.0), 1.0) if targets[i] else 0.0)
                caps.append(lengths[i] if targets[i] else 0)
                total += min(targets[i], lengths[i])
            for i, share in zip(order, share_out(total, weights, caps)):
                out[i] = share
        return out, notes

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        questions: list[str | None] = [self._question(query) for query in queries]
        return super()._compress(texts, questions, ratio, vectors=vectors, **options)


def reorder(passages: Sequence[CompressedPassage], how: str = "sort") -> list[CompressedPassage]:
    """Sorts compressed passages by their relevance.

    Args:
        passages: of one call with ``dynamic_ratio`` above 0, which sets ``info["rank"]``.
        how: ``"sort"``: best first; ``"two_stage"``: best at both ends; ``"original"``: as given.

    Raises:
        ValueError: if a passage has no rank, or ``how`` is unknown.
    """
    if how == "original":
        return list(passages)
    if any("rank" not in passage.info for passage in passages):
        raise ValueError('A passage has no info["rank"]: compress all in one call with dynamic_ratio above 0.')
    ranked = sorted(range(len(passages)), key=lambda i: passages[i].info["rank"])
    return [passages[i] for i in reordered(ranked, how)]
