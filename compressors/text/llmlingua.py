"""LLMLingua: tokens that a language model could have guessed are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.config import CompressorConfig, added
from ..core.passage import CompressedPassage
from ..core.units import Span
from ..registry import register_compressor
from .lm_selection import LMSelectingCompressor, LMSelectionConfig
from .published.contexts import REORDERS, widened
from .published.llmlingua import PublishedPrompt, compress_prompt
from .scoring import TokenScores, self_information
from .shares import kept_share, share_out


@dataclass
class LLMLinguaConfig(LMSelectionConfig):
    """Settings of LLMLingua."""

    method: ClassVar[str] = "llmlingua"

    unit: str = field(default="token", metadata={"help": "what is kept or dropped whole"})
    complete_words: bool = field(
        default=True, metadata={"help": "unit 'token': a token brings the rest of its word (fast)"}
    )
    share: Literal["equal", "scores"] = field(
        default="equal",
        metadata={
            "help": "'equal': every passage of a call is compressed to the ratio; 'scores': budget moves to the passages "
            "with the higher mean scores, the total being the same (fast)"
        },
    )
    iterative_size: int = field(default=200, metadata={"help": "tokens of a window (faithful)"})
    context_budget: float | str = field(
        default=100.0,
        metadata={"help": "tokens added to the target when contexts are chosen, or a step such as '*1.5' (faithful)"},
    )
    reorder: Literal["original", "two_stage", "sort"] = field(
        default="original", metadata={"help": "how chosen contexts stand: original, two_stage or sort (faithful)"}
    )
    dynamic_ratio: float = field(
        default=0.0, metadata={"help": "keep ratios run from +r to -r around the common one, by rank of the passage"}
    )
    sentence_budget: float | None = added(
        None,
        "share of the target that whole sentences may take before tokens go, 1.4 in the release; null: no filter (faithful)",
    )
    keep_split: bool = added(False, "line breaks side by side stay (faithful)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in ("equal", "scores"):
            raise ValueError(f"share must be 'equal' or 'scores', got {self.share!r}.")
        if not isinstance(self.iterative_size, int) or self.iterative_size < 2:
            raise ValueError(f"iterative_size must be an integer of at least 2, got {self.iterative_size!r}.")
        if self.reorder not in REORDERS:
            raise ValueError(f"reorder must be one of {REORDERS}, got {self.reorder!r}.")
        if not 0 <= self.dynamic_ratio < 1:
            raise ValueError(f"dynamic_ratio must lie in [0, 1), got {self.dynamic_ratio!r}.")
        widened(0.0, self.context_budget)  # says what is wrong with it
        if self.sentence_budget is not None and not self.sentence_budget > 0:
            raise ValueError(f"sentence_budget must be a number above 0 or null, got {self.sentence_budget!r}.")


@register_compressor
class LLMLinguaCompressor(LMSelectingCompressor):
    """Keeps the tokens with the highest loss ``-log p(token | before)`` (LLMLingua, arXiv 2310.05736).

    ``mode="fast"``: every token is read once, all passages of a call in batches of like length, and the budget is exact
    for each passage, counted in the reader's tokens. Tokens are chosen with the rest of their words
    (``complete_words``), so that neither a word nor a character is broken. With ``share="scores"`` the passages of a call
    (of a batch, where ``batch_size`` is given) share one budget: each gets its own tokens' share times its mean loss, and
    the total stays exactly what it was. Not in it: contexts that are dropped, and the paper's conditioning on the
    *compressed* prefix, which costs 2.0 to 2.4 times the forwarded tokens.

    ``mode="faithful"``: the published computation (see `iterative`), each passage on its own; a passage shorter than
    ``iterative_size`` stays practically whole, a result may exceed its budget, and a character may be broken.
    `compress_prompt` runs it over a list of contexts, with its choice and order of contexts and its dynamic ratios.

    Nothing is trained. Questions are ignored.
    """

    config_class: ClassVar[type[CompressorConfig]] = LLMLinguaConfig
    config: LLMLinguaConfig

    # -- fast ------------------------------------------------------------------------------------------------------

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The loss in nats of every token (of the scorer) of every text; ``queries`` are ignored."""
        return self_information(self.scorer, texts, window=self.config.window)

    @property
    def level(self) -> str:
        """Words where tokens are to bring the rest of theirs."""
        return "word" if self._completes else self.config.unit

    @property
    def _completes(self) -> bool:
        return self.config.unit == "token" and self.config.complete_words

    def unit_values(self, units: Sequence[Span], scores: TokenScores) -> Tensor:
        """A word is worth as much as the best of its tokens, which is the one that would bring the others."""
        if not self._completes or not units or not scores.offsets:
            return super().unit_values(units, scores)
        starts = torch.tensor([a for a, _ in units])
        first = torch.tensor([a for a, _ in scores.offsets])
        unit = torch.searchsorted(starts, first, right=True) - 1
        floor = float(scores.nll.min())  # a word that no token begins in
        return torch.full((len(units),), floor).scatter_reduce(0, unit, scores.nll.float(), "amax")

    @property
    def pools_budget(self) -> bool:
        """``share="scores"`` divides the budget of a call anew."""
        return self.config.share == "scores"

    def share_budget(
        self,
        texts: Sequence[str],
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Targets in proportion to themselves times the passages' mean scores."""
        means = [float(found[i].nll.mean()) if i in found and len(found[i].nll) else 0.0 for i in range(len(texts))]
        # What a short passage could not use of its own target is no budget for the others.
        total = sum(min(target, n) for target, n in zip(targets, lengths))
        weights = [target * max(mean, 0.0) for target, mean in zip(targets, means)]
        return share_out(total, weights, lengths), [{"mean_score": mean} for mean in means]

    # -- faithful --------------------------------------------------------------------------------------------------

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
        """The published pipeline over a list of contexts (see `iterative.compress_prompt`).

        Args:
            contexts: at least one.
            instruction, question: not compressed, but part of the budget.
            ratio: all tokens over the kept ones; default: the config's.
            target_tokens: the scorer's tokens that the contexts should be compressed to, in place of a ratio.
            forced: indices of contexts that are taken in any case.
            append_question: the question ends the prompt.
        """
        config = self.config
        with self._lock:
            return compress_prompt(
                self.scorer,
                self._check_texts(contexts),
                rate=kept_share(config.ratio if ratio is None else ratio),
                target=target_tokens,
                instruction=instruction,
                question=question,
                reorder=config.reorder,
                shift=config.dynamic_ratio,
                size=config.iterative_size,
                extra=config.context_budget,
                forced=forced,
                append_question=append_question,
                sentences=config.sentence_budget,
                keep_split=config.keep_split,
                **self._published(),
            )

    def _published(self) -> dict[str, Any]:
        """What sets the method's own pipeline apart."""
        return {"ranker": "llmlingua", "compare": False}

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
        if self.config.mode == "fast":
            return super()._compress(texts, queries, ratio, vectors=vectors, target_tokens=target_tokens, **options)
        if options:
            raise TypeError(f"mode='faithful' has no options {sorted(options)}.")
        asked = self.config.ratio if ratio is None else ratio
        info: dict[str, Any] = {"method": self.config.method, "mode": "faithful"}
        info |= {"ratio_asked": float(asked)} if target_tokens is None else {"target_tokens": target_tokens}
        out = []
        for text, query in zip(texts, queries):
            found = None
            if text:
                question = query or "" if self.query_aware else ""
                found = self.compress_prompt([text], question=question, ratio=ratio, target_tokens=target_tokens)
            kept, spans = (found.text, found.spans) if found else ("", ())
            out.append(
                CompressedPassage(
                    "text",
                    self._count(text),
                    self.fingerprint,
                    text=kept,
                    spans=spans,
                    n_tokens=self._count(kept),
                    info=dict(info),
                )
            )
        return out
