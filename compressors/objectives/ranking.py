"""Ranking: choose passages by their slots, the most relevant first (ListMLE)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ..core.passage import CompressedPassage
from ..reader.ranking import ranking_logits, ranking_prompt
from ..reader.reader import Reader
from .registry import Objective, Scored, Setup, register_objective


@register_objective("rank")
class RankingLoss(Objective):
    r"""Listwise ranking by the reader's states (PE-RANK, arXiv 2406.14848, ListMLE).

    The reader reads a query and n compressed passages, then their vectors e (mean slots) in the right order. Its state
    :math:`h_t` after t of them must point to the next:

    .. math:: L = -\frac{1}{n} \sum_{t=1}^{n} \log \frac{e^{h_{t-1} \cdot e_t}}{\sum_{j \ge t} e^{h_{t-1} \cdot e_j}}

    The prompt holds the passages in an order of its own, drawn from the query. `rank_passages` ranks with what is learned. The
    paper also reads each passage as text beside its vector, and adds that loss and a divergence between the two rankings;
    here the passages have no text.

    Memory: the reader's states of prompts of n passages and n - 1 vectors; no logits over the vocabulary.

    Args:
        reader: reads the passages; tune it with the compressor, as the paper does.
    """

    targets = frozenset({"ranking"})

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @classmethod
    def create(cls, setup: Setup) -> Self:
        return cls(setup.compressor.reader)

    def total(self, scored: Scored) -> Tensor:
        """The mean over items, times the target tokens: every objective's sum is later divided by these."""
        passages, ranked = list(scored.passages), []
        for size in scored.sizes:
            ranked.append(passages[:size])
            del passages[:size]
        tokens = sum(map(len, scored.targets))
        return self(scored.questions, ranked) / max(1, len(ranked)) * tokens

    def __call__(self, queries: Sequence[str], ranked: Sequence[Sequence[CompressedPassage]]) -> Tensor:
        """The loss summed over lists of passages, each from the most to the least relevant."""
        if not ranked:
            return torch.zeros((), device=self.reader.device)
        prompts = []
        for query, passages in zip(queries, ranked, strict=True):
            mixed = random.Random(query).sample(list(passages), len(passages))
            prompts.append(ranking_prompt(query, mixed))
        found = []
        for logits in ranking_logits(self.reader, prompts, ranked):
            chosen = torch.ones_like(logits, dtype=torch.bool).tril(-1)  # row t: the first t are ranked already
            found.append(-logits.float().masked_fill(chosen, float("-inf")).log_softmax(-1).diagonal().mean())
        return torch.stack(found).sum()
