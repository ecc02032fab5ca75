"""Provence: keeps the sentences that a classifier of question and passage marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.batching import pad_rows
from ..core.config import CompressorConfig
from ..encoders.lora import lora_rank
from ..encoders.token_classifier import KEEP, Pieces, TokenClassifier, TokenClassifierSettings
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import (
    PruneExample,
    PrunerConfig,
    SentenceScores,
    ThresholdSettings,
    TrainedPruner,
    sentence_index,
    sentence_means,
    sentence_spans,
)
from .scoring import TokenScores

SENTENCE, WORD, RANK = range(3)  # outputs of the head
_UNKNOWN = -1.0  # label without a loss
_RANK_WEIGHT = 0.05  # of the paper


@dataclass
class ProvenceConfig(ThresholdSettings, PrunerConfig, TokenClassifierSettings):
    """Settings of Provence."""

    method: ClassVar[str] = "provence"
    title: ClassVar[str] = "Provence"

    threshold: float = field(
        default=0.1, kw_only=True, metadata={"help": "mode 'published': sentences with a higher probability stay"}
    )
    r: int = lora_rank(32, " (the classifier's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_threshold()
        self.check_classifier()


@register_compressor
class ProvenceCompressor(TrainedPruner):
    """Keeps sentences by the mean probability of their tokens (Provence, arXiv 2501.16214).

    One pass of a bidirectional encoder reads question and passage. Its head gives each token the probability that its sentence
    is needed, and the first token the score of the whole passage (`relevance`). Unlike the paper, a third output says which
    words of a sentence are needed: it trims the sentence that fits only in part. Another difference: the encoder is small and
    frozen below LoRA, and labels come from answers, not from a large model.

    Attributes:
        words: the classifier of question and passage, with three outputs per token.
    """

    config_class: ClassVar[type[CompressorConfig]] = ProvenceConfig
    config: ProvenceConfig

    def __init__(self, config: ProvenceConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.words = TokenClassifier(config, reader.device, query_aware=True, outputs=3)
        self.config = replace(config, frozen_hash=self.words.frozen_hash)

    def trainable_state(self) -> dict[str, Tensor]:
        """LoRA and head."""
        return dict(self.words.named_parameters())

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Copies what fits; a head of two labels, drop and keep, becomes all three outputs: keep minus drop."""
        found = {}
        for name, tensor in weights.items():
            two = ".head." in name and len(tensor) == 2
            found[name] = (tensor[KEEP] - tensor[1 - KEEP]).expand(3, *tensor.shape[1:]) if two else tensor
        return super().start_from(found)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[tuple[Pieces, Tensor]]:
        """The tokens of each text and ``[tokens, 3]`` probabilities: sentence, word, and the passage's (equal in a row)."""

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            found = self.words.logits(ids, mask).float().sigmoid()
            found[..., RANK] = found[:, :1, RANK]
            return found.cpu()

        read = self.words.read(texts, queries, lambda rows: self.words.run_rows(rows, run))
        return [(pieces, torch.cat(parts) if parts else torch.zeros(0, 3)) for pieces, parts in read]

    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """The mean probability of each sentence's tokens, and the words' probabilities."""
        out = []
        for text, (pieces, found) in zip(texts, self.probabilities(texts, queries)):
            spans = sentence_spans(text)
            values = sentence_means(spans, TokenScores(pieces.ids, pieces.offsets, found[:, SENTENCE]))
            out.append(SentenceScores(spans, values, TokenScores(pieces.ids, pieces.offsets, found[:, WORD])))
        return out

    def relevance(self, texts: Sequence[str], query: str) -> list[float]:
        """Probability that each passage helps to answer the question, to rank passages by. 0 for an empty one.

        Raises:
            ValueError: without a question.
        """
        texts = self._check_texts(texts)
        with self._lock:
            found = self.probabilities(texts, [query] * len(texts))
        return [float(values[:, RANK].max()) if len(values) else 0.0 for _, values in found]

    def loss(self, examples: Sequence[PruneExample]) -> dict[str, Tensor]:
        """Cross-entropy of sentences and words over tokens, plus 0.05 times that of the passage over rows."""
        rows, sentences, words, needed = [], [], [], []
        for example in examples:
            pieces, ranges, head = self.words.rows(example.passage, example.question)
            of_sentence, of_word = token_labels(example, pieces)
            for a, b in ranges:
                rows.append([*head, *pieces.ids[a:b], *self.words.pieces.after])
                blank = [_UNKNOWN] * len(head)
                sentences.append([*blank, *of_sentence[a:b], *[_UNKNOWN] * len(self.words.pieces.after)])
                words.append([*blank, *of_word[a:b], *[_UNKNOWN] * len(self.words.pieces.after)])
                labels = of_sentence[a:b]
                needed.append(_UNKNOWN if max(labels) == 0 and _UNKNOWN in labels else max(labels))
        ids, mask = pad_rows(rows, self.words.pieces.pad)
        device = self.words.device
        logits = self.words.logits(ids.to(device), mask.to(device)).float()
        parts = {
            "sentence": known_loss(logits[..., SENTENCE], padded(sentences)),
            "word": known_loss(logits[..., WORD], padded(words)),
            "rank": known_loss(logits[:, 0, RANK], torch.tensor(needed)),
        }
        total = parts["sentence"] + parts["word"] + _RANK_WEIGHT * parts["rank"]
        return {"loss": total, **{f"loss/{name}": value.detach() for name, value in parts.items()}}


def token_labels(example: PruneExample, pieces: Pieces) -> tuple[list[float], list[float]]:
    """Label of each token by its sentence, and by its word; -1 if unknown."""
    starts = [a for a, _ in pieces.offsets]
    values = torch.tensor([_UNKNOWN if value is None else value for value in example.values])
    of_sentence = values[sentence_index(starts, example.sentences)].tolist() if starts else []
    of_word = [_UNKNOWN] * len(starts)
    if example.words:
        kept, ends = torch.tensor(example.kept).float(), torch.tensor([b for _, b in example.words])
        where = sentence_index(starts, example.words)
        inside = (where >= 0) & (torch.tensor(starts) < ends[where.clamp(min=0)])
        of_word = torch.where(inside, kept[where.clamp(min=0)], _UNKNOWN).tolist()
    return of_sentence, of_word


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """``[rows, longest]`` labels, the rest unknown."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, _UNKNOWN)


def known_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over known labels; 0 without any."""
    labels = labels.to(logits.device)
    known = labels != _UNKNOWN
    if not bool(known.any()):
        return logits.sum() * 0.0
    return binary_cross_entropy_with_logits(logits[known], labels[known])
