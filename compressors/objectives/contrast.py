"""Contrast: slots of a question lie nearer to those of its passage than to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.passage import CompressedPassage
from .registry import Objective, Scored, Setup, register_objective


def mean_slot(passage: CompressedPassage) -> Tensor:
    """``[width]`` mean of a passage's slots. Raises ``ValueError`` for another interface than embeds."""
    if passage.embeds is None:
        raise ValueError(
            f"This objective needs slots of interface 'embeds', got {passage.interface!r}; remove it from the recipe."
        )
    return passage.embeds.mean(0)


@register_objective("contrast")
class ContrastLoss(Objective):
    r"""With the mean slots q of a question, p of its passage and n of another passage,

    .. math:: L = -\log \frac{e^{\cos(q, p)}}{e^{\cos(q, p)} + e^{\cos(q, n)}}

    (UniICL, arXiv 2405.17062). Stored slots then serve as retrieval vectors too. The compressor compresses the question as it
    does a passage. The paper takes as p the demonstration that most lowers the frozen reader's perplexity on the answer and as
    n the one that raises it; here p is the passage that the question was written for, and n is drawn at random.

    Memory: three vectors an item; the reader does not run.
    """

    targets = frozenset({"triple"})

    @classmethod
    def create(cls, setup: Setup) -> Self:
        return cls()

    def total(self, scored: Scored) -> Tensor:
        """The mean over items, times the target tokens: every objective's sum is later divided by these."""
        tokens = sum(map(len, scored.targets))
        return self(scored.passages) / max(1, len(scored.targets)) * tokens

    def __call__(self, passages: Sequence[CompressedPassage]) -> Tensor:
        """The loss summed over items; ``passages`` holds question, passage and other passage of each in turn."""
        found = [mean_slot(p) for p in passages]
        if not found:
            return torch.zeros(())
        asked, near, far = torch.stack(found).float().unflatten(0, (-1, 3)).unbind(1)
        scores = torch.stack([F.cosine_similarity(asked, near, dim=-1), F.cosine_similarity(asked, far, dim=-1)], -1)
        return -scores.log_softmax(-1)[:, 0].sum()
