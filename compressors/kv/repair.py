"""Make attention over the kept pairs give what attention over all pairs gave (Attention Matching, arXiv 2602.16284)."""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = 0.05, 20.0  # bounds of a pair's weight
STEPS = 200
WEIGHT_RIDGE = 1e-2  # of the mean diagonal of the normal matrix, towards a weight of 1
VALUE_RIDGE = 1e-2  # the same, towards the pair's own value


def repair(attention: Tensor, values: Tensor, kept: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Bias ``[..., n]`` and values ``[..., n, head_dim]`` of the kept pairs; the other pairs get no bias.

    Args:
        attention: ``[..., rows, n]`` of the probes to the pairs of a passage; what a row lacks to 1 goes to the BOS.
        values: ``[..., n, head_dim]``.
        kept: ``[..., n]`` bool.
        how: ``"bias"`` or ``"bias+values"``.
    """
    dtype = values.dtype
    attention, values = attention.double(), values.double()  # normal matrices square float32's rounding
    # Only kept columns take part: those of each head are moved to the front, up to the longest head.
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., : int(kept.sum(-1).max())]
    part = kept.gather(-1, order)
    columns = attention.gather(-1, order[..., None, :].expand(*attention.shape[:-1], -1)) * part[..., None, :]
    share = attention.sum(-1, keepdim=True)
    weights = match_weights(columns, share, part)
    bias = torch.zeros_like(attention[..., 0, :]).scatter(-1, order, weights.log())
    if how == "bias":
        return bias.to(dtype), values.to(dtype)
    where = order[..., None].expand(*order.shape, values.shape[-1])
    columns = columns * weights[..., None, :]
    columns = columns / (columns.sum(-1, keepdim=True) + (1 - share).clamp(min=0)).clamp(min=1e-12)
    fitted = refit_values(columns, attention @ values, values.gather(-2, where), part)
    return bias.to(dtype), values.scatter(-2, where, fitted).to(dtype)


def match_weights(columns: Tensor, share: Tensor, part: Tensor) -> Tensor:
    """Weights ``[..., t]`` within bounds with which kept pairs take the attention of the whole passage.

    Minimises ``|columns w - share|^2 + ridge |w - 1|^2`` by accelerated projected gradient.

    Args:
        columns: ``[..., rows, t]`` attention to the kept pairs, zero at padding.
        share: ``[..., rows, 1]`` attention to the whole passage.
        part: ``[..., t]`` bool, false at padding.
    """
    normal, target = columns.mT @ columns, (columns.mT @ share)[..., 0]
    ridge = WEIGHT_RIDGE * _mean_diagonal(normal, part)
    step = 1 / (normal.sum(-1).amax(-1, keepdim=True) + ridge).clamp(min=1e-12)
    weights = ahead = torch.ones_like(target)
    for k in range(STEPS):
        slope = (normal @ ahead[..., None])[..., 0] - target + ridge * (ahead - 1)
        new = (ahead - step * slope).clamp(LOW, HIGH)
        ahead = new + (k / (k + 3)) * (new - weights)
        weights = new
    return weights


def refit_values(columns: Tensor, outputs: Tensor, values: Tensor, part: Tensor) -> Tensor:
    """Values ``[..., t, head_dim]`` with which attention ``columns`` gives ``outputs``, by ridge least squares.

    Args:
        columns: ``[..., rows, t]`` attention to the kept pairs as they will be read, zero at padding.
        outputs: ``[..., rows, head_dim]`` that the whole passage gave.
        values: ``[..., t, head_dim]`` of the kept pairs, towards which the ridge pulls.
        part: ``[..., t]`` bool, false at padding.
    """
    normal = columns.mT @ columns
    ridge = (VALUE_RIDGE * _mean_diagonal(normal, part)).clamp(min=1e-12).expand(part.shape)
    return values + torch.linalg.solve(normal + torch.diag_embed(ridge), columns.mT @ (outputs - columns @ values))


def _mean_diagonal(normal: Tensor, part: Tensor) -> Tensor:
    return normal.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp(min=1)
