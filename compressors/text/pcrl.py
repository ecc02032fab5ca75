"""PCRL: keeps the words that a policy keeps, trained by the reader's answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from ..core.config import CompressorConfig, setting
from ..core.units import Span, split_units
from ..encoders.token_classifier import KEEP, TokenClassifier, TokenClassifierSettings
from ..reader.reader import Reader
from ..registry import register_compressor
from .budget import join, merge
from .pruning import means_in
from .sampling import Sample
from .scoring import TokenScores
from .selection import SelectingCompressor, SelectionConfig

_START = 2.0  # logit of "keep" before training: the reward says nothing until most words stay


@dataclass
class PCRLConfig(SelectionConfig, TokenClassifierSettings):
    """Settings of PCRL."""

    method: ClassVar[str] = "pcrl"
    title: ClassVar[str] = "PCRL"

    unit: str = field(default="word", metadata={"help": "kept or dropped as a whole"})
    query_aware: bool = setting(False, "the policy reads the question before the passage", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_classifier()


@register_compressor
class PCRLCompressor(SelectingCompressor):
    """Keeps the words with the highest keep probability of a policy (PCRL, arXiv 2308.08758).

    The policy is a token classifier; a word's logit is the mean of its tokens'. In training each word is kept or dropped at
    random, and the reader's answer from the rest is the reward. ``mode="fast"`` keeps the most probable words within an exact
    budget; ``mode="published"`` keeps every word above one half, whatever the ratio.

    Unlike the paper the policy acts on whole words, its encoder has LoRA, and it may read the question.

    Attributes:
        words: the token classifier, with labels drop and keep.
    """

    config_class: ClassVar[type[CompressorConfig]] = PCRLConfig
    config: PCRLConfig

    def __init__(self, config: PCRLConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.words = TokenClassifier(config, reader.device, query_aware=config.query_aware)
        self.config = replace(config, frozen_hash=self.words.frozen_hash)
        head = self.words.tagger.head  # type: ignore[union-attr]
        with torch.no_grad():
            head.bias[KEEP] += _START

    def trainable_state(self) -> dict[str, Tensor]:
        """LoRA and head."""
        return dict(self.words.named_parameters())

    def logits(self, texts: Sequence[str], queries: Sequence[str | None] | None) -> list[tuple[list[Span], Tensor]]:
        """The words of each text and the ``[words]`` logit of keeping each; differentiable."""

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            found = self.words.logits(ids, mask).float()
            return found[..., KEEP] - found[..., 1 - KEEP]

        out = []
        read = self.words.read(texts, queries, lambda rows: self.words.run_rows(rows, run))
        for text, (pieces, parts) in zip(texts, read):
            spans = split_units(text, "word")
            values = torch.cat(parts) if parts else torch.zeros(0, device=self.words.device)
            out.append((spans, means_in(values, pieces.offsets, spans)))
        return out

    @torch.no_grad()
    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The probability of keeping each word."""
        return [TokenScores([], spans, found.sigmoid().cpu()) for spans, found in self.logits(texts, queries)]

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The words that the policy keeps; ``ratio`` has no effect."""
        if target_tokens is not None:
            raise TypeError("mode='published' takes no max_tokens: the policy decides how many words stay.")
        ((spans, found),) = self.logits([text], [query])
        kept = merge(text, [span for span, value in zip(spans, found.tolist()) if value > 0])
        return join(text, kept, self.config.joiner), kept

    def sample(
        self, texts: Sequence[str], queries: Sequence[str | None], ratio: float | None, count: int, seed: int
    ) -> list[list[Sample]]:
        """See `Sampler`; ``ratio`` has no effect, the policy decides how many words stay."""
        generator = torch.Generator().manual_seed(seed)
        out = []
        for text, (spans, found) in zip(texts, self.logits(texts, queries)):
            policy = Bernoulli(logits=found)
            drawn = torch.rand(count, len(spans), generator=generator).to(found.device) < policy.probs.detach()
            actions = torch.cat([(found > 0)[None], drawn]).float()
            log_probs, entropy = policy.log_prob(actions).sum(1), policy.entropy().sum() / max(1, len(spans))
            texts_kept = [
                join(text, merge(text, [span for span, stays in zip(spans, row) if stays]), self.config.joiner)
                for row in actions.bool().tolist()
            ]
            out.append([Sample(kept, log_prob, entropy) for kept, log_prob in zip(texts_kept, log_probs)])
        return out
