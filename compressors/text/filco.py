"""FILCO: keeps the sentences that an oracle of answers would keep, as a classifier predicts it from the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.batching import pad_rows
from ..core.config import CompressorConfig
from ..core.units import Span
from ..encoders.token_classifier import TokenClassifier, TokenClassifierSettings
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import (
    PruneExample,
    PrunerConfig,
    SentenceScores,
    ThresholdSettings,
    TrainedPruner,
    means_in,
    sentence_spans,
)


@dataclass
class FILCOConfig(ThresholdSettings, PrunerConfig, TokenClassifierSettings):
    """Settings of FILCO."""

    method: ClassVar[str] = "filco"
    title: ClassVar[str] = "FILCO"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_threshold()
        self.check_classifier()


@register_compressor
class FILCOCompressor(TrainedPruner):
    """Keeps the sentences that an oracle would keep (FILCO, arXiv 2311.08377).

    The oracle knows the answer: a sentence holds it, shares words with it, or makes it more likely for the reader (`labels` of
    the recipe). A classifier learns its values from question and passage. A sentence's logit is a linear function of the mean
    state of its tokens. The paper trains a language model to copy the sentences instead.

    Attributes:
        words: the encoder of question and passage, with one output.
    """

    config_class: ClassVar[type[CompressorConfig]] = FILCOConfig
    config: FILCOConfig

    def __init__(self, config: FILCOConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.words = TokenClassifier(config, reader.device, query_aware=True, outputs=1)
        self.config = replace(config, frozen_hash=self.words.frozen_hash)

    def trainable_state(self) -> dict[str, Tensor]:
        """LoRA and head."""
        return dict(self.words.named_parameters())

    @torch.no_grad()
    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """The probability of each sentence."""

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            return self.words.logits(ids, mask).float().cpu()

        read = self.words.read(texts, queries, lambda rows: self.words.run_rows(rows, run))
        out = []
        for text, (pieces, parts) in zip(texts, read):
            spans = sentence_spans(text)
            logits = torch.cat(parts)[:, 0] if parts else torch.zeros(0)
            out.append(SentenceScores(spans, means_in(logits, pieces.offsets, spans).sigmoid()))
        return out

    def loss(self, examples: Sequence[PruneExample]) -> dict[str, Tensor]:
        """Mean cross-entropy between the probabilities of sentences and the oracle's values."""
        rows, where = [], []
        for i, example in enumerate(examples):
            pieces, ranges, head = self.words.rows(example.passage, example.question)
            for a, b in ranges:
                rows.append([*head, *pieces.ids[a:b], *self.words.pieces.after])
                where.append((i, len(head), pieces.offsets[a:b]))
        ids, mask = pad_rows(rows, self.words.pieces.pad)
        logits = self.words.logits(ids.to(self.words.device), mask.to(self.words.device)).float()[..., 0]
        tokens: list[list[Tensor]] = [[] for _ in examples]
        offsets: list[list[Span]] = [[] for _ in examples]
        for found, (i, start, part) in zip(logits, where):
            tokens[i].append(found[start : start + len(part)])
            offsets[i] += part
        kept, wanted = [], []
        for example, parts, places in zip(examples, tokens, offsets):
            if parts:
                kept.append(means_in(torch.cat(parts), places, example.sentences))
                wanted += [-1.0 if value is None else value for value in example.values]
        if not kept:
            return {"loss": logits.sum() * 0.0}
        values = torch.tensor(wanted, device=logits.device)
        known = values >= 0
        if not bool(known.any()):
            return {"loss": logits.sum() * 0.0}
        return {"loss": binary_cross_entropy_with_logits(torch.cat(kept)[known], values[known])}
