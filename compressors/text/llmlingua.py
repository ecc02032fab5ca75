"""LLMLingua: drops the tokens that a language model predicts well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.config import CompressorConfig
from ..core.units import Span
from ..registry import register_compressor
from .budget import kept_share
from .published.llmlingua import LLMLinguaOptions, PublishedPrompt, compress_prompt
from .scoring import TokenScores
from .selection import LMSelectingCompressor, LMSelectionConfig


@dataclass
class LLMLinguaConfig(LMSelectionConfig):
    """Settings of LLMLingua."""

    method: ClassVar[str] = "llmlingua"
    title: ClassVar[str] = "LLMLingua"
    options_class: ClassVar[type[CompressorConfig] | None] = LLMLinguaOptions
    retired: ClassVar[dict[str, Any]] = {"share": "equal"}

    unit: str = field(default="token", metadata={"help": "kept or dropped as a whole"})
    complete_words: bool = field(
        default=True, metadata={"help": "unit 'token': a token brings the rest of its word (fast)"}
    )
    dynamic_ratio: float = field(
        default=0.0, metadata={"help": "keep ratios run from +r to -r around the common one, by the passage's rank"}
    )
    published: LLMLinguaOptions = field(
        default_factory=LLMLinguaOptions, kw_only=True, metadata={"help": "options of mode 'published' alone"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dynamic_ratio < 1:
            raise ValueError(f"dynamic_ratio must lie in [0, 1), got {self.dynamic_ratio!r}.")


@register_compressor
class LLMLinguaCompressor(LMSelectingCompressor):
    """Keeps the tokens with the highest loss ``-log p(token | before)`` (LLMLingua, arXiv 2310.05736).

    ``mode="fast"``: each token is read once, and each passage has an exact budget in the reader's tokens. Whole words are
    kept (``complete_words``). Unlike the paper no context is dropped, and losses are not conditioned on the *compressed*
    prefix, which would cost 2.0 to 2.4 times the forwarded tokens.

    ``mode="published"``: the released algorithm, passage by passage. A passage shorter than ``iterative_size`` stays
    almost whole, a result may exceed its budget, and a number or a character may be broken. `compress_prompt`
    runs it on several contexts; ``dynamic_ratio`` applies there alone.

    No training. Questions are ignored.
    """

    config_class: ClassVar[type[CompressorConfig]] = LLMLinguaConfig
    config: LLMLinguaConfig

    @property
    def level(self) -> str:
        """Words if tokens bring the rest of their words."""
        return "word" if self._completes else self.config.unit

    @property
    def _completes(self) -> bool:
        return self.config.unit == "token" and self.config.complete_words

    def unit_values(self, units: Sequence[Span], scores: TokenScores) -> Tensor:
        """A word is worth as much as its best token."""
        if not self._completes or not units or not scores.offsets:
            return super().unit_values(units, scores)
        starts = torch.tensor([a for a, _ in units])
        first = torch.tensor([a for a, _ in scores.offsets])
        unit = torch.searchsorted(starts, first, right=True) - 1
        floor = float(scores.nll.min())  # for a word in which no token begins
        return torch.full((len(units),), floor).scatter_reduce(0, unit, scores.nll.float(), "amax")

    def compress_prompt(
        self,
        contexts: Sequence[str],
        *,
        instruction: str = "",
        question: str = "",
        ratio: float | None = None,
        target_tokens: float | None = None,
        forced: Sequence[int] = (),
        append_question: bool = True,
    ) -> PublishedPrompt:
        """Runs the released pipeline on a list of contexts, with ``config.published`` and ``config.dynamic_ratio``.

        Args:
            contexts: at least one.
            instruction, question: not compressed, but part of the budget.
            ratio: all tokens over kept tokens; default: the config's.
            target_tokens: the scorer's tokens of the compressed contexts, instead of a ratio.
            forced: indices of contexts that are always chosen.
            append_question: end the prompt with the question.
        """
        with self._lock:
            return compress_prompt(
                self.scorer,
                self._check_texts(contexts),
                self.config.published,
                rate=kept_share(self.config.ratio if ratio is None else ratio),
                target=target_tokens,
                instruction=instruction,
                question=question,
                shift=self.config.dynamic_ratio,
                forced=forced,
                append_question=append_question,
            )

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The released algorithm on one passage."""
        question = query or "" if self.query_aware else ""
        found = self.compress_prompt([text], question=question, ratio=ratio, target_tokens=target_tokens)
        return found.text, found.spans
