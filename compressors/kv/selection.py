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


def root_mean_square(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Root mean square attention of the probes: how much of their attention a pair gets where it matters."""
    return (attention(layer, evidence).square().sum(2) / count_rows(layer, evidence)).sqrt()


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


def expected_attention(layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
    """Attention that a Gaussian of the passage's own queries gives, times the value's norm (arXiv 2510.00636).

    Mean and covariance are those of the unrotated queries, moved to the average of the next 512 positions.
    """
    batch, heads, n, width = layer.own.shape
    device, end = layer.own.device, evidence.tokens.sum(1) + evidence.start
    queries = wide(layer.own)
    average = torch.eye(width, device=device).expand(batch, -1, -1)  # maps a row of a query to its average place
    if placement.kinds[index] == ROTARY:
        home = torch.arange(n, device=device) + evidence.start
        queries = placement.rotate(queries.flatten(0, 1), -home, index).view_as(queries)
        eye = torch.eye(width, device=device)[:, None].expand(-1, FUTURE, -1)
        ahead = torch.arange(FUTURE, device=device)
        average = torch.stack([placement.rotate(eye, ahead + int(at), index).mean(1) for at in end])
    used = evidence.tokens.clone()
    if not evidence.start and n > 1:
        used[:, 0] &= evidence.tokens.sum(1) < 2  # the first token is the attention sink
    weights = (used / used.sum(1, keepdim=True))[:, None, :, None]
    mean = (queries * weights).sum(2, keepdim=True)
    covariance = ((queries - mean) * weights).mT @ (queries - mean)
    mean, covariance = mean @ average[:, None], average[:, None].mT @ covariance @ average[:, None]
    keys = wide(layer.keys).repeat_interleave(heads // layer.keys.shape[1], 1)
    scores = (keys @ mean.mT)[..., 0] * layer.scaling
    scores = scores + ((keys @ covariance) * keys).sum(-1) * layer.scaling**2 / 2
    scores = scores.masked_fill(~used[:, None], -torch.inf).softmax(-1)
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
    "probes": (root_mean_square, "questions"),
    "kvzip": (largest, "repetition"),
    "snapkv": (pooled_mean, "query"),
    "keydiff": (key_difference, "nothing"),
    "expected": (expected_attention, "nothing"),
    "random": (random_order, "nothing"),
    "first": (first_tokens, "nothing"),
}
BUDGETS = ("global", "per-layer", "uniform")


def select(scores: Tensor, lengths: Tensor, ratio: float, budget: str, *, sink: bool) -> Tensor:
    """Which pairs to keep.

    Args:
        scores: ``[batch, layers, kv_heads, n]``.
        lengths: ``[batch]`` tokens of each passage; what comes after is padding.
        ratio: source tokens per pair, in the mean over heads; every head keeps at least one pair.
        budget: ``"uniform"`` gives every head as many pairs, ``"per-layer"`` divides a layer's pairs over its heads by
            score (AdaKV, arXiv 2407.11550), ``"global"`` divides all pairs over all heads by one ranking. The last two
            leave every head `FLOOR` of an even share.
        sink: always keep the first token.

    Returns:
        ``[batch, layers, kv_heads, n]`` bool.
    """
    _, layers, heads, n = scores.shape
    at = torch.arange(n, device=scores.device)
    scores = scores.masked_fill(at >= lengths.to(at.device)[:, None, None, None], -torch.inf)
    if sink:
        scores[..., 0] = torch.inf
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
