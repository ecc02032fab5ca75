"""State matching: the reader's hidden states over the slots equal those over the text."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Objective, Scored, Setup, register_objective


@register_objective("states")
class StateMatchingLoss(Objective):
    r"""Smooth L1 between the hidden states h that predict the target tokens, read from the slots, and those read from the text,
    :math:`\hat h` (CompLLM, arXiv 2509.19228), relative to the deviation of the latter over the batch:

    .. math:: L = \sum_i \frac{1}{d} \sum_j \mathrm{smooth}_{L1}\left(\frac{h_{ij} - \hat h_{ij}}{\sigma(\hat h)}\right)

    Denser than the answer's likelihood, and needs no logits. The paper sums over all layers; these are the last ones, after
    the final norm, which the head reads.

    Memory: hidden states of both, ``[N, d]``.
    """

    targets = frozenset({"answer", "continuation"})
    teacher = True

    @classmethod
    def create(cls, setup: Setup) -> Self:
        return cls()

    def total(self, scored: Scored) -> Tensor:
        if not isinstance(scored.teacher, Tensor):
            raise ValueError(
                "The objective states needs the teacher's hidden states; set no teacher_cache, which keeps likely tokens only."
            )
        return self(scored.hidden, scored.teacher)

    def __call__(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """The loss summed over rows; both are ``[N, d]``."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = teacher.detach().to(wide)
        scale = wanted.std().clamp(min=1e-6)
        return F.smooth_l1_loss(hidden.to(wide) / scale, wanted / scale, reduction="none").mean(-1).sum()
