"""Semantic compression: the most central sentences of each topic of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.config import CompressorConfig, check_counts, setting
from ..core.hidden import hide
from ..encoders.embedder import MINILM, Embedder, load_embedder
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import PrunerConfig, SentencePruner, SentenceScores, sentence_spans

_NEAR = 20.0  # sentences over which the affinity of two falls to 1 / e
_CENTRAL = 0.7  # weight of the similarity to the topic, against that to sentences already chosen
_ROUNDS = 20  # of k-means, at most
_BLOCK = 500  # neighbouring sentences that are clustered together, at most


@dataclass
class SemanticConfig(PrunerConfig):
    """Settings of semantic compression."""

    method: ClassVar[str] = "semantic"
    title: ClassVar[str] = "Semantic compression"
    cost: ClassVar[str] = "scores"
    unpublished: ClassVar[str] = "the paper summarises each topic by a language model"

    embedder: str = setting(MINILM, "sentence-transformers model that embeds sentences", kw_only=True)
    topic_words: int = setting(200, "words per topic; a shorter text is one topic", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"topic_words": 1})


@register_compressor
class SemanticCompressor(SentencePruner):
    """Keeps the same share of every topic (semantic compression, arXiv 2312.09571).

    Sentences are embedded and clustered into topics: spectral clustering of ``max(0, cos)^2 exp(-distance / 20)``. Inside a
    topic, maximal marginal relevance (Carbonell and Goldstein 1998) orders the sentences: close to the topic's mean, unlike
    those before. The paper summarises each topic by a language model; here the sentences stay as they are.

    No training. Questions are ignored.

    Args:
        config: the settings.
        reader: the reader; the budget counts its tokens.
        embedder: an embedder that is already loaded, instead of ``config.embedder``.
    """

    config_class: ClassVar[type[CompressorConfig]] = SemanticConfig
    training_free = True
    query_aware: bool = False
    config: SemanticConfig
    embedder: Embedder

    def __init__(self, config: SemanticConfig, reader: Reader, *, embedder: Embedder | None = None) -> None:
        super().__init__(config, reader)
        hide(self, "embedder", embedder or load_embedder(config.embedder, reader.device))

    def identity_parts(self) -> list[Any]:
        """Reader and embedder."""
        return [*super().identity_parts(), self.embedder.fingerprint]

    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """1 minus the share of its topic's words that stand before each sentence in the topic's order."""
        spans = [sentence_spans(text) for text in texts]
        vectors = self.embedder.means([text[a:b] for text, cuts in zip(texts, spans) for a, b in cuts])
        out = []
        for text, cuts, found in zip(texts, spans, vectors.split([len(cuts) for cuts in spans])):
            sizes = torch.tensor([float(len(text[a:b].split())) for a, b in cuts])
            count = min(len(cuts), max(1, -(-int(sizes.sum()) // self.config.topic_words)))
            out.append(
                SentenceScores(cuts, topic_shares(found.double(), sizes.double(), topics(found.double(), count)))
            )
        return out


def topics(vectors: Tensor, count: int) -> Tensor:
    """``[sentences]`` topic of each sentence, by spectral clustering of their unit vectors ``[sentences, width]``.

    A text of more than 500 sentences is clustered in blocks: sentences so far apart have no affinity.
    """
    n = len(vectors)
    if count < 2:
        return torch.zeros(n, dtype=torch.long)
    if n > _BLOCK:
        blocks = vectors.tensor_split(-(-n // _BLOCK))
        counts = [max(1, round(count * len(block) / n)) for block in blocks]
        return torch.cat([topics(b, k) + sum(counts[:i]) for i, (b, k) in enumerate(zip(blocks, counts))])
    place = torch.arange(n, dtype=vectors.dtype)
    affinity = (vectors @ vectors.T).clamp(min=0) ** 2 * torch.exp(-(place[:, None] - place).abs() / _NEAR)
    scale = affinity.sum(1).clamp(min=1e-12).rsqrt()
    _, basis = torch.linalg.eigh(affinity * scale[:, None] * scale)
    return k_means(normalize(basis[:, -count:], dim=-1), count)


def k_means(points: Tensor, count: int) -> Tensor:
    """``[points]`` cluster of each point. The first centres are the first point and, again and again, the farthest point."""
    chosen, nearest = [0], torch.cdist(points, points[:1])[:, 0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(points, points[chosen[-1:]])[:, 0])
    centres = points[chosen]
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        sizes = torch.bincount(labels, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        before, labels = labels, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, labels):
            break
    return labels


def topic_shares(vectors: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
    """``[sentences]`` float32 values: 1 minus the share of the topic's words that come before in its order."""
    values = torch.zeros(len(sizes))
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        order = members[marginal_order(vectors[members])]
        before = sizes[order].cumsum(0) - sizes[order]
        values[order] = (1 - before / sizes[order].sum().clamp(min=1)).float()
    return values


def marginal_order(vectors: Tensor) -> list[int]:
    """Indices of unit vectors ``[n, width]`` by maximal marginal relevance to their mean."""
    central = vectors @ normalize(vectors.mean(0), dim=0)
    nearest = torch.full((len(vectors),), 0.0, dtype=vectors.dtype)
    left, order = torch.ones(len(vectors), dtype=torch.bool), []
    for _ in range(len(vectors)):
        score = _CENTRAL * central - (1 - _CENTRAL) * nearest
        best = int(score.masked_fill(~left, float("-inf")).argmax())
        order.append(best)
        left[best] = False
        nearest = torch.maximum(nearest, vectors @ vectors[best])
    return order
