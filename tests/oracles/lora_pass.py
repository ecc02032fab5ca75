"""A pass of a tiny Llama in plain torch, whose LoRA changes chosen tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """``[heads, n, size]`` turned by RoPE, halves of a vector being pairs."""
    half = x.shape[-1] // 2
    angles = positions[:, None].to(x.dtype) * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def run(
    reader: Any,
    encoder: Any,
    embeds: Tensor,
    positions: Tensor,
    where: dict[str, Tensor],
    past: list[tuple[Tensor, Tensor, Tensor]] | None = None,
    scale: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """Unrotated keys and values ``[kv_heads, n, size]`` of every layer.

    Args:
        reader: over a tiny Llama.
        encoder: its `LoRATwin`.
        embeds, positions: ``[n, width]`` and ``[n]``.
        where: of each module with LoRA, ``[n]`` bool, the tokens that it changes.
        past: of each layer, unrotated keys, values and positions, which later tokens see.
        scale: alpha / r.
    """
    model, made, hidden = reader.model.model, [], embeds
    causal = torch.ones(len(embeds), len(embeds), dtype=torch.bool).tril()

    def norm(layer: Any, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + layer.variance_epsilon).rsqrt() * layer.weight

    for number, layer in enumerate(model.layers):

        def project(name: str, x: Tensor, part: str, layer: Any = layer, number: int = number) -> Tensor:
            out = x @ getattr(getattr(layer, part), name).weight.T
            key = f"layers/{number}/{part}/{name}/lora_"
            if f"{key}A" in encoder.lora:
                change = x @ encoder.lora[f"{key}A"].T @ encoder.lora[f"{key}B"].T * scale
                out = out + change * where[name][:, None]
            return out

        x = norm(layer.input_layernorm, hidden)
        queries, keys, values = (
            project(name, x, "self_attn").unflatten(-1, (-1, 8)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        made.append((keys, values))
        seen, turned, held = causal, rotate(keys, positions), values
        if past is not None:
            before = rotate(past[number][0], past[number][2])
            turned, held = torch.cat([before, turned], 1), torch.cat([past[number][1], held], 1)
            seen = torch.cat([past[number][2] < positions[:, None], causal], 1)
        groups = len(queries) // len(keys)
        turned, held = turned.repeat_interleave(groups, 0), held.repeat_interleave(groups, 0)
        scores = rotate(queries, positions) @ turned.mT / 8**0.5
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ held
        hidden = hidden + project("o_proj", mixed.transpose(0, 1).flatten(1), "self_attn")
        x = norm(layer.post_attention_layernorm, hidden)
        gate, up = (project(name, x, "mlp") for name in ("gate_proj", "up_proj"))
        hidden = hidden + project("down_proj", torch.nn.functional.silu(gate) * up, "mlp")
    return made
