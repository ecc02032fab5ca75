"""Token importance: weigh target tokens by how much the passage helps to predict them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.hidden import hide
from .chunked import Head
from .distillation import KLDistillationLoss
from .language_modeling import LanguageModelingLoss
from .registry import Scored, Setup, register_objective

MOST_GAIN = 2.0  # gamma, in nats; the paper gives no value


def importance_weights(full: Tensor, blind: Tensor, lengths: Sequence[int], most: float = MOST_GAIN) -> Tensor:
    """``[N]`` weights, mean 1 in each item: its length times the softmax of ``min(full - blind, most)``.

    Args:
        full: ``[N]`` log-probability of each target token, with the passages as text.
        blind: ``[N]`` log-probability without the passages.
        lengths: number of target tokens of each item.
        most: gamma, the largest gain that counts.
    """
    gains = (full - blind).clamp(max=most).split(list(lengths))
    return torch.cat([gain.softmax(0) * len(gain) for gain in gains])


@torch.no_grad()
def target_logprobs(hidden: Tensor, ids: Tensor, head: Head, chunk: int) -> Tensor:
    """``[N]`` log-probabilities of target tokens, with logits of ``chunk`` rows at a time."""
    found = [
        -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), part, reduction="none")
        for rows, part in zip(hidden.split(chunk), ids.split(chunk))
        for logits in [head(rows)]
    ]
    return torch.cat(found) if found else hidden.new_zeros(0)


class _Importance:
    """Mixin of a loss whose rows are weighed by `importance_weights`; needs the teacher and a pass without passages."""

    chunk: int
    teacher_head: Head

    def importance(self, scored: Scored) -> Tensor:
        """``[N]`` weights. Raises ``ValueError`` if the teacher's predictions are missing or truncated."""
        if not isinstance(scored.teacher, Tensor) or scored.blind is None:
            raise ValueError(
                "Token importance needs the reader's hidden states with and without the passages; set no teacher_cache, "
                "which keeps the teacher's most likely tokens only."
            )
        full, blind = (
            target_logprobs(hidden, scored.ids, self.teacher_head, self.chunk)
            for hidden in (scored.teacher, scored.blind)
        )
        return importance_weights(full, blind, [len(ids) for ids in scored.targets])


@register_objective("important_lm")
class ImportantLMLoss(_Importance, LanguageModelingLoss):
    r"""Language modelling with segment-wise token importance (Deng et al., arXiv 2412.17483, section 5.2).

    .. math:: L = \sum_i w_i \, (-\log p(a_i \mid z, q, a_{<i})), \quad
              w_i = n \, \mathrm{softmax}_i \min(\log p(a_i \mid x, q, a_{<i}) - \log p(a_i \mid q, a_{<i}), \gamma)

    over the n target tokens of an item. The frozen reader gives both probabilities, with the passage x as text and without it:
    two more passes of the reader. Tokens that follow from the question alone count less. The paper compares the whole context
    with the token's own segment; a passage is a segment, and without it the reader sees the prompt alone.

    Memory: as `TokenLoss`, and ``4 * chunk * V`` bytes without gradient for the weights.
    """

    teacher = True
    blind = True

    @classmethod
    def create(cls, setup: Setup) -> Self:
        loss: Any = cls(setup.compressor.reader.head)
        hide(loss, "teacher_head", setup.compressor.base_reader.head)
        return loss

    def total(self, scored: Scored) -> Tensor:
        return self(scored.hidden, scored.ids, self.importance(scored), num_items=1)


@register_objective("important_kl")
class ImportantKLLoss(_Importance, KLDistillationLoss):
    """Distillation with the weights of `ImportantLMLoss` on the divergence at each target token."""

    blind = True

    def total(self, scored: Scored) -> Tensor:
        weights = self.importance(scored)
        return self(scored.hidden, scored.teacher, weights, num_items=1)
