"""Projectors from an encoder's states to slots on the scale of the reader's embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reader.reader import Reader


def matching_factor(hidden: Tensor, reader: Reader) -> float:
    """Factor that brings hidden states ``[n, width]`` to the mean norm of the reader's embeddings."""
    return reader.embedding_norm / max(float(hidden.float().norm(dim=-1).mean()), 1e-6)


def learned_scale(factor: float, reader: Reader) -> nn.Parameter:
    """The logarithm of a factor, as a parameter. Apply it with `scaled`."""
    return nn.Parameter(torch.tensor(math.log(factor), device=reader.device))


def scaled(hidden: Tensor, log_scale: Tensor | None) -> Tensor:
    """``hidden * exp(log_scale)``; unchanged without a scale."""
    if log_scale is None:
        return hidden
    return hidden.to(log_scale.device, log_scale.dtype) * log_scale.exp()


def scaled_identity(factor: float, reader: Reader) -> nn.Linear:
    """A linear layer that starts as multiplication by a factor."""
    linear = nn.Linear(reader.width, reader.width, device=reader.device)
    nn.init.zeros_(linear.bias)
    with torch.no_grad():
        linear.weight.copy_(factor * torch.eye(reader.width))
    return linear


def mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers between these widths, with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:]):
        layers += [*([activation()] if layers else []), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def check_width(hidden: Tensor, reader: Reader, advice: str = "use another method with this reader") -> None:
    """Raises ``ValueError`` if states are not as wide as the reader's embeddings."""
    if hidden.shape[-1] != reader.width:
        raise ValueError(
            f"The encoder's hidden states are {hidden.shape[-1]} wide, and {reader.name!r} takes embeddings of width "
            f"{reader.width}; {advice}."
        )


class WindowProjector(nn.Module):
    r"""Base class of methods whose slot is a window of tokens, pooled.

    With weights :math:`w` that add up to 1 in each window, token states :math:`h` and reader embeddings :math:`e`,

    .. math:: slot_k = A \frac{\sum_t w_t e_t}{\sqrt{\sum_t w_t^2}}
              + s \cdot \mathrm{MLP}\big(\mathrm{RMSNorm}(\sum_t w_t h_t)\big).

    A starts as the identity and the MLP's last layer at zero, so that slots start as pooled embeddings. s starts at the root
    mean square of the reader's embeddings.

    Attributes:
        linear: A, ``[width, width]``.
        norm, mlp: RMSNorm over pooled states; Linear, GELU, Linear to the reader's width.
        log_scale: logarithm of s.
    """

    norm: nn.RMSNorm
    mlp: nn.Sequential
    linear: nn.Linear
    log_scale: nn.Parameter

    def add_projector(self, reader: Reader, size: int, hidden_size: int | None) -> None:
        """Makes the layers.

        Args:
            reader: the reader.
            size: width of the token states.
            hidden_size: width of the MLP's hidden layer; default: twice the reader's.
        """
        hidden = hidden_size or 2 * reader.width
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.mlp = mlp((size, hidden, reader.width), nn.GELU)
        self.linear = nn.Linear(reader.width, reader.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(reader.embedding_norm / math.sqrt(reader.width))))
        nn.init.eye_(self.linear.weight)
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def pool_windows(self, embeds: Tensor, states: Tensor, weights: Tensor, where: Tensor, n: int) -> Tensor:
        """``[n, width]`` slots.

        Args:
            embeds: ``[tokens, width]`` reader embeddings.
            states: ``[tokens, size]`` token states.
            weights: ``[tokens]``.
            where: ``[tokens]`` index of each token's window.
            n: number of windows.
        """
        pooled = embeds.new_zeros(n, embeds.shape[1]).index_add(0, where, embeds * weights[:, None])
        length = weights.new_zeros(n).index_add(0, where, weights.square()).sqrt()
        means = states.new_zeros(n, states.shape[1]).index_add(0, where, states * weights[:, None])
        out: Any = self.linear(pooled / length[:, None]) + self.mlp(self.norm(means)) * self.log_scale.exp()
        return out
