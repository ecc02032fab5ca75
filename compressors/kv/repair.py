"""Make attention over the kept pairs give what attention over all pairs gave (Attention Matching, arXiv 2602.16284)."""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = 0.05, 20.0  # bounds of a pair's weight
ROUNDS = 20  # of the active-set method, at most; some five are enough
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
    # Only kept columns take part: those of each head are moved to the front, up to the longest head.
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., : int(kept.sum(-1).max())]
    part = kept.gather(-1, order)
    columns = attention.gather(-1, order[..., None, :].expand(*attention.shape[:-1], -1)) * part[..., None, :]
    share = attention.sum(-1, keepdim=True)
    weights = match_weights(columns, share, part).to(values)
    bias = torch.zeros_like(attention[..., 0, :]).scatter(-1, order, weights.log())
    if how == "bias":
        return bias, values
    where = order[..., None].expand(*order.shape, values.shape[-1])
    columns = columns * weights[..., None, :]
    columns = columns / (columns.sum(-1, keepdim=True) + (1 - share).clamp(min=0)).clamp(min=1e-12)
    fitted = refit_values(columns, attention @ values, values.gather(-2, where), part)
    return bias, values.scatter(-2, where, fitted)


def match_weights(columns: Tensor, share: Tensor, part: Tensor) -> Tensor:
    """Weights ``[..., t]`` within bounds with which kept pairs take the attention of the whole passage.

    Minimises ``|columns w - share|^2 + ridge |w - 1|^2`` by a primal-dual active-set method (Hintermueller, Ito and Kunisch
    2002): weights that would leave the bounds stand at them, the others are solved for, until both sets stay as they are.

    Args:
        columns: ``[..., rows, t]`` attention to the kept pairs, zero at padding.
        share: ``[..., rows, 1]`` attention to the whole passage.
        part: ``[..., t]`` bool, false at padding.
    """
    columns, share = columns.double(), share.double()  # a normal matrix squares float32's rounding
    normal, target = columns.mT @ columns, (columns.mT @ share)[..., 0]
    ridge = WEIGHT_RIDGE * _mean_diagonal(normal, part)
    normal, target = _with_diagonal(normal, ridge, part), (target + ridge).masked_fill(~part, 1.0)
    scale = normal.diagonal(dim1=-2, dim2=-1)
    weights, force = torch.ones_like(target), torch.zeros_like(target)
    before = None
    for _ in range(ROUNDS):
        moved = weights + force / scale
        low, high = moved < LOW, moved > HIGH
        fixed = low | high
        if before is not None and torch.equal(fixed, before):
            break
        before = fixed
        stand = low.to(normal) * LOW + high.to(normal) * HIGH
        missing = torch.where(fixed, stand, target - (normal @ stand[..., None])[..., 0])
        system = normal.masked_fill(fixed[..., None] | fixed[..., None, :], 0.0) + torch.diag_embed(fixed.to(normal))
        weights = torch.cholesky_solve(missing[..., None], torch.linalg.cholesky(system))[..., 0]
        force = (target - (normal @ weights[..., None])[..., 0]) * fixed
    return weights.clamp(LOW, HIGH)


def refit_values(columns: Tensor, outputs: Tensor, values: Tensor, part: Tensor) -> Tensor:
    """Values ``[..., t, head_dim]`` with which attention ``columns`` gives ``outputs``, by ridge least squares.

    Args:
        columns: ``[..., rows, t]`` attention to the kept pairs as they will be read, zero at padding.
        outputs: ``[..., rows, head_dim]`` that the whole passage gave.
        values: ``[..., t, head_dim]`` of the kept pairs, towards which the ridge pulls.
        part: ``[..., t]`` bool, false at padding.
    """
    missing = outputs - columns @ values
    columns, missing = columns.double(), missing.double()
    normal = columns.mT @ columns
    system = _with_diagonal(normal, VALUE_RIDGE * _mean_diagonal(normal, part), part)
    return values + torch.cholesky_solve(columns.mT @ missing, torch.linalg.cholesky(system)).to(values)


def _mean_diagonal(normal: Tensor, part: Tensor) -> Tensor:
    return normal.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp(min=1)


def _with_diagonal(normal: Tensor, ridge: Tensor, part: Tensor) -> Tensor:
    """A normal matrix with its ridge, positive definite also where nothing attends; the identity at padding."""
    return normal + torch.diag_embed(torch.where(part, ridge.clamp(min=1e-12), 1.0))
