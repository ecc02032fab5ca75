"""Which keys and values to keep: scores of pairs, and budgets that divide them over layers and heads.

All functions work on whole layers ``[batch, kv_heads, ...]``; nothing loops over heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reader.kv import ROTARY, KVPlacement
from .probing import Evidence, LayerEvidence

FLOOR = 0.3  # share of an even division that every head keeps
FUTURE = 512  # positions after a passage over which Expected Attention averages


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attention(layer: LayerEvidence, evidence: Evidence, *, own: bool = False) -> Tensor:
    """Attention of the probes ``[batch, kv_heads, rows, n]`` to the passage, at least in float32.

    Rows are those of all query heads that share the KV head; they are zero at padding. The softmax runs over BOS and passage,
    with ``own`` also over the probe itself.
    """
    if layer.attended is not None and not own:
        return layer.attended
    batch, heads = layer.keys.shape[:2]
    groups, start, n = layer.queries.shape[1] // heads, layer.front.shape[2], layer.keys.shape[2]
    queries = wide(layer.queries).reshape(batch, heads, -1, layer.queries.shape[-1])
    keys = [layer.front, layer.keys, *([layer.asked] if own else [])]
    scores = queries @ wide(torch.cat(keys, 2)).mT * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    scores[..., start : start + n].masked_fill_(~evidence.tokens[:, None, None], -torch.inf)
    if own:
        scores[..., start + n :].masked_fill_(~evidence.seen.repeat(1, groups, 1)[:, None], -torch.inf)
    rows = evidence.rows.repeat(1, groups)[:, None, :, None]
    found = scores.softmax(-1)[..., start : start + n].masked_fill_(~rows, 0.0)
    if evidence.shared and not own:
        layer.attended = found
    return found


def count_rows(layer: LayerEvidence, evidence: Evidence) -> Tensor:
    """``[batch, 1, 1]`` rows of `attention` that are no padding."""
    return evidence.rows.sum(1).clamp(min=1)[:, None, None] * (layer.queries.shape[1] // layer.keys.shape[1])


def sharp_mean(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Fourth-power mean of the probes' attention, times the value's norm: how much a pair gives to the rows that want it.

    The high power favours pairs that few rows want much. The norm makes heads of different scale comparable in one ranking.
    """
    mean = attention(layer, evidence).square().square_().sum(2) / count_rows(layer, evidence)
    return mean.sqrt().sqrt() * value_norm(layer)


def value_norm(layer: LayerEvidence) -> Tensor:
    """``[batch, kv_heads, n]`` lengths of the values."""
    return wide(layer.values).norm(dim=-1)


def largest(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Largest attention of any row of any head (KVzip, arXiv 2505.23416)."""
    return attention(layer, evidence, own=True).amax(2)


def pooled_mean(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Mean attention of the rows, averaged over five neighbours (SnapKV, arXiv 2404.14469, as in kvpress)."""
    mean = attention(layer, evidence, own=True).sum(2) / count_rows(layer, evidence)
    return F.avg_pool1d(mean, 5, stride=1, padding=2)


def key_difference(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Minus the cosine between a key and its head's mean direction (KeyDiff, arXiv 2504.15364)."""
    keys = F.normalize(wide(layer.keys), dim=-1) * evidence.tokens[:, None, :, None]
    return -F.cosine_similarity(keys, keys.sum(2, keepdim=True), dim=-1)


def contribution(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Largest share of the residual stream that a pair adds: attention ``|W_O v| / |h|`` (KVzip+, arXiv 2601.07891).

    ``h`` is the residual stream of the row that attends, as it enters the layer. kvpress divides by its norm after the
    layer's normalisation.
    """
    if layer.states is None:
        raise ValueError("KVzip+ needs the residual stream: read(..., states=True).")
    heads, n = layer.keys.shape[1], layer.keys.shape[2]
    groups = layer.queries.shape[1] // heads
    rows = attention(layer, evidence, own=True).unflatten(2, (groups, -1))
    out = wide(output_weight(placement, index)).to(rows).unflatten(1, (heads, groups, -1))
    gram = torch.einsum("okgd,okge->kgde", out, out)
    values = wide(layer.values)
    added = torch.einsum("bknd,kgde,bkne->bkgn", values, gram, values).clamp(min=0).sqrt()
    size = wide(layer.states[:, n:]).norm(dim=-1).clamp(min=1e-12)
    return (rows * added[:, :, :, None] / size[:, None, None, :, None]).amax((2, 3))


def output_weight(placement: KVPlacement, index: int) -> Tensor:
    """Output projection ``[hidden, heads * head_dim]`` of a layer's attention; raises ``ValueError`` if it has none to see."""
    names = ("self_attn.o_proj", "attention.dense", "self_attention.dense", "attn.out_proj")
    found = dict(placement.decoder.layers[index].named_modules())
    weight = next((getattr(found[name], "weight", None) for name in names if name in found), None)
    if weight is None or not weight.is_floating_point():
        raise ValueError(
            f"The score 'kvzip+' multiplies by the output projection of {type(placement.model).__name__}, and finds none in "
            f"floating point under {', '.join(names)}; use 'kvzip', or load the reader unquantised."
        )
    return weight


def expected_attention(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Attention that a Gaussian of the passage's own queries gives, times the value's norm (arXiv 2510.00636).

    Mean and covariance are those of the unrotated queries, moved to the average of the next 512 positions.
    """
    queries = unrotated(layer.own, evidence, placement, index)
    weights = apart_from_sink(evidence)
    weights = (weights / weights.sum(1, keepdim=True))[:, None, :, None]
    mean = (queries * weights).sum(2, keepdim=True)
    covariance = ((queries - mean) * weights).mT @ (queries - mean)
    return gaussian_attention(layer, evidence, placement, index, mean[:, :, 0], covariance)


def unrotated(queries: Tensor, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Queries ``[batch, heads, n, head_dim]`` of a passage as they were before rotation, at least in float32."""
    queries = wide(queries)
    if placement.kinds[index] != ROTARY:
        return queries
    home = torch.arange(queries.shape[2], device=queries.device) + evidence.start
    return placement.rotate(queries.flatten(0, 1), -home, index).view_as(queries)


def apart_from_sink(evidence: Evidence) -> Tensor:
    """``[batch, n]`` bool, the tokens of passages, without the first where it is the attention sink."""
    used = evidence.tokens.clone()
    if not evidence.start and used.shape[1] > 1:
        used[:, 0] &= evidence.tokens.sum(1) < 2
    return used


def gaussian_attention(
    layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int, mean: Tensor, covariance: Tensor
) -> Tensor:
    """Attention of Gaussian queries at the next 512 positions, times the value's norm (arXiv 2510.00636, equations 6 to 9).

    Args:
        layer, evidence, placement, index: as for every score.
        mean: ``[batch or 1, heads, head_dim]`` of unrotated queries.
        covariance: ``[batch or 1, heads, head_dim, head_dim]``.
    """
    heads, width = layer.own.shape[1], layer.own.shape[-1]
    device, end = layer.own.device, evidence.tokens.sum(1) + evidence.start
    eye = torch.eye(width, device=device, dtype=mean.dtype)
    average = eye.expand(len(end), -1, -1)  # maps a row of a query to its average place
    if placement.kinds[index] == ROTARY:
        rows, ahead = eye[:, None].expand(-1, FUTURE, -1), torch.arange(FUTURE, device=device)
        average = torch.stack([placement.rotate(rows, ahead + int(at), index).mean(1) for at in end])
    mean, covariance = mean[:, :, None] @ average[:, None], average[:, None].mT @ covariance @ average[:, None]
    keys = wide(layer.keys).repeat_interleave(heads // layer.keys.shape[1], 1)
    scores = (keys @ mean.mT)[..., 0] * layer.scaling
    scores = scores + ((keys @ covariance) * keys).sum(-1) * layer.scaling**2 / 2
    scores = scores.masked_fill(~apart_from_sink(evidence)[:, None], -torch.inf).softmax(-1)
    shared = scores.unflatten(1, (layer.keys.shape[1], -1)).mean(2)
    return shared * wide(layer.values).norm(dim=-1)


def random_order(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Random numbers: a control."""
    generator = torch.Generator().manual_seed(index)
    _, heads, n, _ = layer.keys.shape
    return torch.rand(n, heads, generator=generator).T.to(layer.keys.device).expand(len(layer.keys), -1, -1)


def first_tokens(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """The earlier, the higher: a control."""
    order = torch.arange(layer.keys.shape[2], 0, -1.0, device=layer.keys.device)
    return order.expand(layer.keys.shape[:3])


Score = Callable[[LayerEvidence, Evidence, KVPlacement, int], Tensor]
# Of each score: its function, and what is read after the passage for it.
SCORES: dict[str, tuple[Score, str]] = {
    "probes": (sharp_mean, "questions"),
    "kvzip": (largest, "repetition"),
    "kvzip+": (contribution, "repetition"),
    "snapkv": (pooled_mean, "query"),
    "keydiff": (key_difference, "nothing"),
    "expected": (expected_attention, "nothing"),
    "random": (random_order, "nothing"),
    "first": (first_tokens, "nothing"),
}
BUDGETS = ("global", "per-layer", "uniform")


def select(
    scores: Tensor, lengths: Tensor, ratio: float, budget: str, *, sink: bool, protected: Tensor | None = None
) -> Tensor:
    """Which pairs to keep.

    Args:
        scores: ``[batch, layers, kv_heads, n]``.
        lengths: ``[batch]`` tokens of each passage; what comes after is padding.
        ratio: source tokens per pair, in the mean over heads; every head keeps at least one pair.
        budget: ``"uniform"`` gives every head as many pairs, ``"per-layer"`` divides a layer's pairs over its heads by
            score (AdaKV, arXiv 2407.11550), ``"global"`` divides all pairs over all heads by one ranking. The last two
            leave every head `FLOOR` of an even share.
        sink: always keep the first token.
        protected: ``[batch, n]`` bool, tokens to keep in every head; they must fit the budget.

    Returns:
        ``[batch, layers, kv_heads, n]`` bool.
    """
    _, layers, heads, n = scores.shape
    at = torch.arange(n, device=scores.device)
    scores = scores.masked_fill(at >= lengths.to(at.device)[:, None, None, None], -torch.inf)
    if sink:
        scores[..., 0] = torch.inf
    if protected is not None:
        scores = scores.masked_fill(protected[:, None, None], torch.inf)
    groups = {"global": 1, "per-layer": layers, "uniform": layers * heads}[budget]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    for row, length in enumerate(lengths.tolist()):
        share = length / ratio
        ranked = scores[row].masked_fill(rank[row] < max(1, int(FLOOR * share)), torch.inf).view(groups, -1)
        most = max(layers * heads // groups, int(share * layers * heads / groups + 1e-6))
        best = ranked.argsort(dim=-1, descending=True, stable=True)[:, :most]
        chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True)
        kept[row] = chosen.view(layers, heads, n) & (at < length)
    return kept
