"""Runs a tuned reader and keeps its keys and values at memory tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..core.batching import SoftSequence, soft_batches
from ..encoders.lora_twin import LoRATwin, Twin
from ..reader.kv import FIXED, position_arguments
from ..reader.reader import Reader


@dataclass
class KVSlots:
    """Keys and values of some tokens.

    Attributes:
        keys, values: one ``[kv_heads, slots, head_dim]`` tensor per layer.
        positions: ``[slots]`` int64, the positions at which the keys were computed.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


def cached_layers(decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, kv_heads, time, head_dim]`` of every layer, differentiable.

    Args:
        decoder: the body of a causal LM.
        embeds: ``[batch, time, width]``.
        mask: ``[batch, time]``, 0 for padding on the right.
        positions: ``[batch, time]``.

    Raises:
        RuntimeError: if the model does not keep keys and values of every position.
    """
    cache = DynamicCache()  # without the config: a sliding layer's cache would keep its window only
    decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **position_arguments(decoder, positions),
    )
    layers: list[Any] = cache.layers
    if not layers or any(layer.keys is None or layer.keys.shape[2] != embeds.shape[1] for layer in layers):
        raise RuntimeError(
            f"{type(decoder).__name__} kept no keys and values of this pass, so there is nothing to store; switch gradient "
            "checkpointing off, which drops them."
        )
    return [(layer.keys, layer.values) for layer in layers]


@contextlib.contextmanager
def adding(layers: Sequence[nn.Module], sums: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the first layers add ``[batch, time, hidden]`` tensors to their outputs, one each."""

    def hook(extra: Tensor) -> Any:
        return lambda layer, given, out: (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

    handles = [layer.register_forward_hook(hook(extra)) for layer, extra in zip(layers, sums)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def kv_shapes(reader: Reader) -> list[tuple[int, int, int]]:
    """``(kv_heads, width of a key, width of a value)`` of every layer, measured on the model."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=reader.device)
    layers = cached_layers(reader.model.get_decoder(), reader.embed(ids), torch.ones_like(ids), ids)
    return [(k.shape[1], k.shape[3], v.shape[3]) for k, v in layers]


def encode_kv(twin: Twin, sequences: Sequence[SoftSequence], *, budget: int = 16384) -> list[KVSlots]:
    """Keys and values at memory tokens at the end of sequences, differentiable; batched equals one by one.

    Args:
        twin: the tuned reader.
        sequences: what to read; their last ``len(places)`` tokens are the memory tokens.
        budget: positions per forward pass, padding included.
    """
    embed = twin.lm.get_input_embeddings()
    out: dict[int, KVSlots] = {}
    for batch in soft_batches(sequences, embed, embed.weight.device, budget=budget):
        layers = cached_layers(twin.decoder, batch.embeds, batch.mask, batch.positions)
        for row, (i, length) in enumerate(zip(batch.which, batch.lengths)):
            span = slice(length - len(sequences[i].places), length)
            # Cloned: a view would keep the whole batch's cache in memory.
            keys = tuple(k[row, :, span].clone() for k, _ in layers)
            values = tuple(v[row, :, span].clone() for _, v in layers)
            out[i] = KVSlots(keys, values, batch.positions[row, span].cpu())
    return [out[i] for i in range(len(sequences))]


def check_movable(reader: Reader) -> None:
    """Raises ``ValueError`` if this reader has no keys, or its keys cannot be moved to other positions."""
    if getattr(reader.model, "_is_stateful", False):
        raise ValueError(
            f"{type(reader.model).__name__} is a state-space model: it keeps a running state (in some or all layers) "
            "and no keys and values per token; use an embeds method such as icae, or a text method, with this reader."
        )
    if FIXED in reader.kv_placement.kinds:
        raise ValueError(
            f"{type(reader.model).__name__} mixes positions into its keys (learned positions or an unknown rotation), so "
            "keys and values computed after a passage cannot be read at other positions; use an embeds method such as "
            "icae, or a text method, with this reader."
        )


def drop_idle_lora(twin: Twin) -> None:
    """Drops the LoRA matrices that no key or value depends on: all in the last layer but those of keys and values.

    For a twin that only encodes. They would be saved but never get a gradient.
    """
    if not isinstance(twin, LoRATwin):
        return
    embed = twin.lm.get_input_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.long, device=embed.weight.device)
    with torch.enable_grad():
        layers = cached_layers(twin.decoder, embed(ids), torch.ones_like(ids), torch.arange(2, device=ids.device)[None])
        total = sum((k.float().sum() + v.float().sum() for k, v in layers), torch.zeros((), device=ids.device))
        names = list(twin.lora)
        found = torch.autograd.grad(total, [twin.lora[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, found):
        if gradient is None:
            twin.lora.pop(name).requires_grad_(False)  # its product stays zero
