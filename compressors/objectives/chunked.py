"""Losses over hidden states at target positions, in bounded memory.

`Reader.target_hidden` gives the hidden states ``[N, d]`` that predict N target tokens; the reader's head turns them into
logits. The head runs on `chunk` rows at a time and each chunk's gradient is formed with its value, so at most
``chunk x vocabulary`` logits exist and the head runs once. (A head that is trained is recomputed in the backward pass.)

Every loss is ``sum_i w_i loss_i / num_items``. `num_items` defaults to the sum of the weights, which gives a mean; with the
total over an accumulated batch, accumulated gradients equal those of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.hidden import hide
from .teacher import TeacherLogits

Head = Callable[[Tensor], Tensor]
Other = Tensor | TeacherLogits  # references of the rows


class _SumOfChunks(torch.autograd.Function):
    """Sum over chunks of rows; computes the gradient together with the value, chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, loss: Callable[..., Tensor], chunk: int, other: Other, weights: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                value = loss(rows, other[part], weights[part])
            (gradient[part],) = torch.autograd.grad(value, rows)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None


class ChunkedLoss(nn.Module):
    """Sums a loss over rows, `chunk` rows at a time.

    Attributes:
        head: hidden states ``[n, d]`` to logits ``[n, vocabulary]``.
    """

    head: Head

    def __init__(self, head: Head, chunk: int = 512) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk is a number of rows and must be at least 1, got {chunk}.")
        hide(self, "head", head)
        self.chunk = chunk

    def _logits(self, hidden: Tensor, head: Head | None = None) -> Tensor:
        """Logits in at least float32, which a softmax over a large vocabulary needs."""
        logits = (head or self.head)(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _rows(self, hidden: Tensor, other: Any) -> Tensor:
        raise NotImplementedError

    def _sum(self, hidden: Tensor, other: Other, weights: Tensor) -> Tensor:
        return (self._rows(hidden, other) * weights).sum()

    def _trains_head(self, hidden: Tensor) -> bool:
        """Whether the head has parameters that require a gradient."""
        with torch.enable_grad():
            return self.head(hidden[:1].detach()).requires_grad

    def _reduce(self, hidden: Tensor, other: Other, weights: Tensor | None, num_items: float | Tensor | None) -> Tensor:
        n = hidden.shape[0]
        if hidden.dim() != 2:
            raise ValueError(f"Hidden states must be [rows, width], got {list(hidden.shape)}.")
        if weights is not None and weights.shape != (n,):
            raise ValueError(f"weights must hold one number a row, [{n}], got {list(weights.shape)}.")
        if weights is None:
            weights = hidden.new_ones(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not n:
            return hidden.sum() * 0.0
        if n <= self.chunk:
            total = self._sum(hidden, other, weights)
        elif hidden.requires_grad and torch.is_grad_enabled() and not self._trains_head(hidden):
            total = _SumOfChunks.apply(hidden, self._sum, self.chunk, other, weights)
        else:
            total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
            for start in range(0, n, self.chunk):
                part = slice(start, start + self.chunk)
                rows = (hidden[part], other[part], weights[part])
                total = total + checkpoint(self._sum, *rows, use_reentrant=False, preserve_rng_state=False)
        return total / (weights.sum() if num_items is None else num_items)
