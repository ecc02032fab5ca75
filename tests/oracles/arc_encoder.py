"""ARC-Encoder in plain torch, from the paper's description and the names of the released weights."""

from __future__ import annotations

import math

import torch


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def turned(x, positions, theta):
    """Rotary embedding of ``[n, heads, size]`` on neighbouring pairs, as complex numbers."""
    size = x.shape[-1]
    rates = theta ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.polar(torch.ones(1, dtype=torch.double), positions[:, None].double() * rates)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle).flatten(-2)


def block(w, x, others, size, theta, eps):
    """One layer: ``x`` as queries and residual, ``others`` as keys and values; nothing is masked."""
    q = norm(x, w["attention_norm"], eps) @ w["attention.wq"].T
    k, v = (norm(others, w["attention_norm"], eps) @ w[f"attention.{n}"].T for n in ("wk", "wv"))
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    q, k = (turned(t, torch.arange(len(t)), theta) for t in (q, k))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)).softmax(-1)
    h = x + torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w["attention.wo"].T
    inner = norm(h, w["ffn_norm"], eps)
    gate = torch.nn.functional.silu(inner @ w["feed_forward.w1"].T) * (inner @ w["feed_forward.w3"].T)
    return h + gate @ w["feed_forward.w2"].T


def run_lengths(n, rate):
    """Tokens of each run: as few runs as fit, as even as can be, the longer ones first."""
    count = math.ceil(n / rate)
    return [n // count + (i < n % count) for i in range(count)]


def states(table, layers, ids, rate, *, size, theta, eps):
    """``[runs, width]`` in float64 after the last layer."""
    layers = [{name: t.double() for name, t in layer.items()} for layer in layers]
    h = table[torch.tensor(ids)].double()
    for w in layers[:-1]:
        h = block(w, h, h, size, theta, eps)
    pooled = torch.stack([part.mean(0) for part in h.split(run_lengths(len(ids), rate))])
    return block(layers[-1], pooled, h, size, theta, eps)
