"""Truncated teacher predictions: the most likely tokens and the total probability of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 512  # rows whose logits exist at the same time


@dataclass(frozen=True)
class TeacherLogits:
    r"""The k most likely tokens at target positions, and the tail.

    The KL divergence over these k + 1 outcomes is smaller than over the vocabulary by the tail's probability times the
    divergence between the conditional distributions within the tail:
    :math:`D(p \| q) = D_{k+1}(p \| q) + p_{tail} D(p_{\cdot | tail} \| q_{\cdot | tail})`.

    Attributes:
        ids: ``[N, k]`` integers.
        logprobs: ``[N, k + 1]`` log-probabilities, at least float32: of `ids`, then of all other tokens together.
    """

    ids: Tensor
    logprobs: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.logprobs.shape != (self.ids.shape[0], self.ids.shape[1] + 1):
            raise ValueError(
                f"ids must be [N, k] and logprobs [N, k + 1], got {list(self.ids.shape)} and {list(self.logprobs.shape)}."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> TeacherLogits:
        return TeacherLogits(self.ids[rows], self.logprobs[rows])

    def to(self, device: torch.device) -> TeacherLogits:
        """Copies to a device."""
        return TeacherLogits(self.ids.to(device), self.logprobs.to(device))

    @classmethod
    def join(cls, parts: Sequence[TeacherLogits]) -> TeacherLogits:
        """Concatenates rows."""
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts]))

    @classmethod
    @torch.no_grad()
    def of(cls, hidden: Tensor, head: object, top_k: int, temperature: float = 1.0) -> TeacherLogits:
        """Computes them from hidden states ``[N, d]`` and the head, in bounded memory.

        Raises:
            ValueError: if `top_k` is not below the vocabulary size, which leaves no tail.
        """
        ids, logprobs = [], []
        for part in hidden.split(_ROWS):
            logits = head(part)  # type: ignore[operator]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
            if not 1 <= top_k < logits.shape[-1]:
                raise ValueError(
                    f"top_k must be at least 1 and below the vocabulary of {logits.shape[-1]}, got {top_k}."
                )
            kept = logits.topk(top_k, dim=-1).indices
            ids.append(kept)
            logprobs.append(with_tail(logits, kept))
        return cls(torch.cat(ids), torch.cat(logprobs))


def with_tail(logits: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities ``[n, k + 1]`` of the `kept` tokens ``[n, k]`` and of all others together."""
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, kept), rest], dim=-1) - total
