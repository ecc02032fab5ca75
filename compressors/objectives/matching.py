"""Slot matching: pull each slot towards the pooled embeddings of the tokens it stands for, as a start for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.hidden import hide
from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..slots.segments import slot_of_token
from .registry import Objective, Scored, Setup, register_objective

TOKENS = 8  # tokens pooled into one slot; the reader recovers fewer words from a sum of more
NORM = 1.0  # norm of a slot, in mean embedding norms
SAMPLE = 2000  # passages on which document frequencies are counted


@register_objective("match")
class SlotMatchingLoss(nn.Module, Objective):
    r"""For slot z with the tokens t it stands for, :math:`1 - \cos(z, y) + (\log \lVert z \rVert - \log e)^2`, where
    :math:`y = \sum_t w_t^2 E_t` over the `TOKENS` different tokens of greatest weight, E the reader's embeddings, e their
    mean norm and :math:`w_t = \log (D / (1 + d_t))` the inverse document frequency.

    The reader copies from its context by comparing embeddings, and questions and answers name rare tokens. Slots near the
    sum of their rare tokens are readable before any training through the reader, which then starts with a useful gradient.
    Takes one pass of the compressor and none of the reader. Not from a paper; mean pooling starts from the same idea.

    Args:
        reader: source of the embeddings.
        counts: ``[vocabulary]`` number of `documents` that contain each token.
        documents: D.

    Raises:
        ValueError: if the length of ``counts`` is not the reader's vocabulary.
    """

    targets = frozenset({"slots"})
    reader: Reader

    def __init__(self, reader: Reader, counts: Tensor, documents: int) -> None:
        super().__init__()
        if counts.shape != (reader.vocab_size,):
            raise ValueError(f"counts must be [{reader.vocab_size}], one a token, got {list(counts.shape)}.")
        hide(self, "reader", reader)
        self.weights = torch.log(documents / (1.0 + counts.float())).clamp(min=0).square()

    @classmethod
    def create(cls, setup: Setup) -> Self:
        """Counts document frequencies on passages of the training data."""
        reader = setup.compressor.reader
        texts = setup.draw("match", SAMPLE)
        counts = torch.zeros(reader.vocab_size)
        for ids in reader.tokenize_batch(texts):
            counts[torch.tensor(sorted(set(ids)))] += 1
        return cls(reader, counts, len(texts))

    def total(self, scored: Scored) -> Tensor:
        """The mean over slots, times the target tokens: every objective's sum is later divided by these."""
        loss, slots = self(scored.passages, scored.targets)
        return loss / max(1, slots) * sum(map(len, scored.targets))

    def forward(self, passages: Sequence[CompressedPassage], ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """The loss summed over slots, and the number of slots.

        Args:
            passages: of interface ``embeds``, differentiable.
            ids: token ids of each passage.

        Raises:
            ValueError: for passages of another interface.
        """
        reader = self.reader
        if wrong := [p.interface for p in passages if p.embeds is None]:
            raise ValueError(
                f"The objective match needs slots of interface 'embeds', got {wrong[0]!r}; remove it from the recipe."
            )
        read = [(p, tokens) for p, tokens in zip(passages, ids, strict=True) if p.slots]
        if not read:
            return torch.zeros((), device=reader.device), 0
        found = torch.cat([p.embeds for p, _ in read if p.embeds is not None]).float()
        owner = slot_of_token([len(tokens) for _, tokens in read], [p.slots for p, _ in read])
        target = self._pooled(torch.tensor([i for _, tokens in read for i in tokens]), owner, len(found))
        length = torch.log(found.norm(dim=-1).clamp(min=1e-6) / (NORM * reader.embedding_norm))
        return (1 - F.cosine_similarity(found, target, dim=-1) + length.square()).sum(), len(found)

    @torch.no_grad()
    def _pooled(self, ids: Tensor, owner: Tensor, slots: int) -> Tensor:
        """``[slots, width]`` weighted sums over the rarest different tokens of each slot."""
        reader = self.reader
        pairs = (owner * reader.vocab_size + ids).unique()  # a token counts once per slot
        owner, ids = pairs // reader.vocab_size, pairs % reader.vocab_size
        weights = self.weights[ids]
        silent = torch.zeros(slots).index_add(0, owner, weights)[owner] == 0
        weights = torch.where(silent, 1.0, weights)  # only common tokens: weigh them equally
        order = weights.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]  # by slot, rarest first
        owner, ids, weights = owner[order], ids[order], weights[order]
        rank = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        kept = rank < TOKENS
        owner, ids, weights = (t[kept].to(reader.device) for t in (owner, ids, weights))
        tokens = reader.embed(ids).float()
        return tokens.new_zeros(slots, tokens.shape[1]).index_add(0, owner, tokens * weights[:, None])
