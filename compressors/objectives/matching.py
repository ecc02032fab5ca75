"""A start for soft slots: each made to resemble the pooled embeddings of the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..slots.segments import slot_of_token

TOKENS = 8  # one vector cannot tell more of them apart; with all of a paragraph's tokens the reader made out less
NORM = 1.0  # of a slot, in mean embedding norms


class SlotMatchingLoss(nn.Module):
    r"""For slot z with the tokens t it stands for, :math:`1 - \cos(z, y) + (\log \lVert z \rVert - \log e)^2`, where
    :math:`y = \sum_t w_t^2 E_t` over the `TOKENS` different tokens of greatest weight, E the reader's embeddings, e their
    mean norm and :math:`w_t = \log (D / (1 + d_t))` the inverse document frequency.

    The reader copies from its context by comparing embeddings. Rare tokens, weighted as in a search index, are what
    questions name and answers are, so slots near their sum can be read before any training with the reader, and that
    training starts where there is a gradient to follow. It needs one pass of the compressor and none of the reader. Not in
    any of the papers; the idea of a start at pooled embeddings is that of mean pooling.

    Args:
        reader: the reader whose embeddings are matched.
        counts: ``[vocabulary]`` number of the `documents` that hold each token.
        documents: D.

    Raises:
        ValueError: if ``counts`` has another length than the reader's vocabulary.
    """

    def __init__(self, reader: Reader, counts: Tensor, documents: int) -> None:
        super().__init__()
        if counts.shape != (reader.vocab_size,):
            raise ValueError(f"counts must be [{reader.vocab_size}], one a token, got {list(counts.shape)}.")
        self._held = (reader,)
        self.weights = torch.log(documents / (1.0 + counts.float())).clamp(min=0).square()

    def forward(self, passages: Sequence[CompressedPassage], ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """The loss summed over slots, and their number.

        Args:
            passages: compressed to ``embeds``, differentiable.
            ids: the reader's tokens of each passage.

        Raises:
            ValueError: for passages of another interface.
        """
        (reader,) = self._held
        if wrong := [p.interface for p in passages if p.embeds is None]:
            raise ValueError(f"Slots are matched as embeddings, not as {wrong[0]!r}; leave out match.")
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
        (reader,) = self._held
        pairs = (owner * reader.vocab_size + ids).unique()  # a token counts once a slot
        owner, ids = pairs // reader.vocab_size, pairs % reader.vocab_size
        weights = self.weights[ids]
        silent = torch.zeros(slots).index_add(0, owner, weights)[owner] == 0
        weights = torch.where(silent, 1.0, weights)  # only common tokens: all of them alike
        order = weights.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]  # by slot, the rarest first in each
        owner, ids, weights = owner[order], ids[order], weights[order]
        rank = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        kept = rank < TOKENS
        owner, ids, weights = (t[kept].to(reader.device) for t in (owner, ids, weights))
        tokens = reader.embed(ids).float()
        return tokens.new_zeros(slots, tokens.shape[1]).index_add(0, owner, tokens * weights[:, None])
