"""Scores with weights that are fitted to a reader once, on generic text, in closed form.

`Surrogate` is a linear map from hidden states to the scores that probes give, so that indexing reads a passage once (KVzap,
arXiv 2601.07891). `QueryStatistics` are mean and covariance of the reader's queries, for Expected Attention on passages that
are too short for their own (arXiv 2510.00636).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reader.kv import KVPlacement
from ..reader.reader import Reader
from .probing import Evidence, LayerEvidence, read, write_probes
from .selection import apart_from_sink, gaussian_attention, sharp_mean, unrotated, value_norm, wide

EXTRA = 5  # features beside the hidden state
RIDGE = 1e-2  # of the mean diagonal of the normal matrix
LEAST = 1e-6  # smaller attention counts as this
BATCH = 2  # passages of like length


def features(layer: LayerEvidence, evidence: Evidence) -> Tensor:
    """``[batch, n, hidden + 5]``: states scaled to unit mean square, and where a token stands in a passage of which length.

    Positions and lengths come last: 1, ``log n``, ``i / n``, ``log(i + 1)``, ``log(n - i)``.
    """
    if layer.states is None:
        raise ValueError("A surrogate needs the residual stream: read(..., states=True).")
    n = evidence.tokens.shape[1]
    states = layer.states[:, :n].float()
    states = states * states.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    length = evidence.tokens.sum(1, keepdim=True).clamp(min=1).float()
    at = torch.arange(n, device=states.device).expand(len(states), -1)
    ends = (at + 1).log(), (length - at).clamp(min=1).log()
    places = torch.stack([torch.ones_like(ends[0]), length.log().expand_as(at), at / length, *ends], -1)
    return torch.cat([states, places], -1)


class FittedScore(nn.Module):
    """A score of pairs with weights; see `selection.Score`. Its parameters are zero until it is fitted or loaded."""

    def check_fitted(self) -> None:
        """Raises ``ValueError`` if it was neither fitted nor loaded."""
        if not all(bool(weight.any()) for weight in self.parameters()):
            raise ValueError(
                "This score has weights, and they were not fitted; load a folder that holds them, such as "
                "load_compressor('kv-surrogate-smollm2', reader=reader), or fit them to this reader: "
                "python -m nutgraf.recipes.kv_surrogate."
            )


class Surrogate(FittedScore):
    """Predicts the logarithm of the probes' fourth-power mean attention (after KVzap, arXiv 2601.07891, linear variant).

    Args:
        reader: whose layers and widths.

    Attributes:
        weight: ``[layers, hidden + 5, kv_heads]``.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        layers, _, heads, _ = attention_shape(reader)
        width = reader.model.config.get_text_config().hidden_size
        self.weight = nn.Parameter(torch.zeros(layers, width + EXTRA, heads), requires_grad=False)

    def forward(self, layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
        """Scores ``[batch, kv_heads, n]`` of a layer, in place of those that probes give."""
        return (features(layer, evidence) @ self.weight[index].float()).mT.exp() * value_norm(layer)

    @torch.no_grad()
    def fit(self, reader: Reader, texts: Sequence[str], probes: int = 48) -> dict[str, float]:
        """Ridge regression on the scores of rule-made questions, in closed form.

        Args:
            reader: whose states and scores.
            texts: passages; every eighth by length is held out.
            probes: questions per passage at most.

        Returns:
            ``passages``, ``tokens`` and ``r2``, the mean explained variance over heads on the held-out passages.
        """
        layers, size, heads = self.weight.shape  # type: ignore[misc]
        normal = torch.zeros(layers, size, size, dtype=torch.float64)
        target = torch.zeros(layers, size, heads, dtype=torch.float64)
        held: list[tuple[Tensor, Tensor]] = []
        tokens, ordered = 0, sorted(texts, key=len)
        for start in range(0, len(ordered), BATCH):
            part = ordered[start : start + BATCH]
            ids = reader.tokenize_batch(part)
            asked = [write_probes(reader, text, "questions", probes, None) for text in part]
            evidence = read(reader, ids, asked, states=True)
            used = evidence.tokens.clone()
            used[:, 0] &= bool(evidence.start)  # without a BOS it is the attention sink, and always kept
            kept_out = torch.tensor([(start + i) % 8 == 7 for i in range(len(part))], device=used.device)
            tokens += int(used.sum())
            found = []
            for index, layer in enumerate(evidence.layers):
                x = features(layer, evidence).double()
                asked_for = sharp_mean(layer, evidence, reader.kv_placement, index) / value_norm(layer)
                y = asked_for.clamp(min=LEAST).log().mT.double()
                train = used & ~kept_out[:, None]
                normal[index] += (x[train].T @ x[train]).cpu()
                target[index] += (x[train].T @ y[train]).cpu()
                found.append((x[used & kept_out[:, None]].float().cpu(), y[used & kept_out[:, None]].float().cpu()))
            held.append(tuple(torch.stack(side) for side in zip(*found)))  # type: ignore[arg-type]
        ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)
        weight = torch.linalg.solve(normal + torch.diag_embed(ridge[:, None].expand(-1, size)), target)
        self.weight.copy_(weight)
        x, y = (torch.cat(side, 1) for side in zip(*held))
        unexplained = (y - x @ weight.float()).square().sum(1) / (y - y.mean(1, keepdim=True)).square().sum(1)
        return {"passages": len(texts), "tokens": tokens, "r2": float(1 - unexplained.mean())}


class QueryStatistics(FittedScore):
    """Expected Attention with mean and covariance of the reader's queries on generic text, not of the passage's own.

    Args:
        reader: whose layers and widths.

    Attributes:
        mean: ``[layers, heads, head_dim]`` of unrotated queries.
        covariance: ``[layers, heads, head_dim, head_dim]``.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        layers, heads, _, width = attention_shape(reader)
        self.mean = nn.Parameter(torch.zeros(layers, heads, width), requires_grad=False)
        self.covariance = nn.Parameter(torch.zeros(layers, heads, width, width), requires_grad=False)

    def forward(self, layer: LayerEvidence, evidence: Evidence, placement: KVPlacement, index: int) -> Tensor:
        """Scores ``[batch, kv_heads, n]`` of a layer."""
        mean, covariance = (part[index].to(wide(layer.keys))[None] for part in (self.mean, self.covariance))
        return gaussian_attention(layer, evidence, placement, index, mean, covariance)

    @torch.no_grad()
    def fit(self, reader: Reader, texts: Sequence[str], probes: int = 0) -> dict[str, float]:
        """Collects the queries of texts, apart from attention sinks.

        Args:
            reader: whose queries.
            texts: generic text.
            probes: not used; every fitted score takes it.

        Returns:
            ``passages`` and ``tokens``.
        """
        total, square, tokens = self.mean.double() * 0, self.covariance.double() * 0, 0
        for start in range(0, len(texts), BATCH):
            ids = reader.tokenize_batch(list(texts[start : start + BATCH]))
            evidence = read(reader, ids, [[] for _ in ids])
            used = apart_from_sink(evidence)
            tokens += int(used.sum())
            for index, layer in enumerate(evidence.layers):
                found = unrotated(layer.own, evidence, reader.kv_placement, index).transpose(1, 2)[used].double()
                total[index] += found.sum(0).to(total)
                square[index] += torch.einsum("thd,the->hde", found, found).to(total)
        mean = total / tokens
        self.mean.copy_(mean)
        self.covariance.copy_((square - tokens * mean[..., None] * mean[..., None, :]) / (tokens - 1))
        return {"passages": len(texts), "tokens": tokens}


def attention_shape(reader: Reader) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and width of a head, measured on the model."""
    evidence = read(reader, [[0]], [[]])
    heads, width = evidence.layers[0].own.shape[1], evidence.layers[0].own.shape[-1]
    return len(evidence.layers), heads, evidence.layers[0].keys.shape[1], width


FITTED: dict[str, type[Surrogate | QueryStatistics]] = {"surrogate": Surrogate, "expected-stats": QueryStatistics}
