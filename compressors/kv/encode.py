"""Runs a tuned reader and keeps its keys and values at memory tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
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

    @classmethod
    def at(cls, layers: Sequence[tuple[Tensor, Tensor]], positions: Tensor, row: int, places: Sequence[int]) -> KVSlots:
        """The slots at some places of one row of a batch, copied, so that they do not keep the batch in memory.

        Args:
            layers: keys and values ``[batch, kv_heads, time, head_dim]``.
            positions: ``[batch, time]``.
            row, places: which row and which of its columns.
        """
        at = torch.tensor(places, dtype=torch.long, device=positions.device)
        keys, values = (tuple(pair[side][row][:, at] for pair in layers) for side in (0, 1))
        return cls(keys, values, positions[row, at].cpu())

    def chosen(self, which: Tensor) -> KVSlots:
        """The slots of some indices ``[n]``."""
        at = which.to(self.keys[0].device)
        keys, values = (tuple(layer[:, at] for layer in side) for side in (self.keys, self.values))
        return KVSlots(keys, values, self.positions[which])


def cached_layers(
    decoder: Any, embeds: Tensor, mask: Any, positions: Tensor, past: DynamicCache | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, kv_heads, time, head_dim]`` of every layer, differentiable.

    Args:
        decoder: the body of a causal LM.
        embeds: ``[batch, time, width]``.
        mask: ``[batch, time]``, 0 for padding on the right; or what `KVPlacement.mask` gives.
        positions: ``[batch, time]``.
        past: keys and values to attend to beside those of this pass, which are added to it.

    Raises:
        RuntimeError: if the model does not keep keys and values of every position.
    """
    # Without the config: a sliding layer's cache would keep its window only.
    cache: Any = DynamicCache() if past is None else past
    before = cache.get_seq_length()
    decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **position_arguments(decoder, positions),
    )
    layers: list[Any] = cache.layers
    if not layers or any(layer.keys is None or layer.keys.shape[2] != before + embeds.shape[1] for layer in layers):
        raise RuntimeError(
            f"{type(decoder).__name__} kept no keys and values of this pass, so there is nothing to store; switch gradient "
            "checkpointing off, which drops them."
        )
    return [(layer.keys[:, :, before:], layer.values[:, :, before:]) for layer in layers]


@contextlib.contextmanager
def adding(layers: Iterable[nn.Module], sums: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the first layers add ``[batch, time, hidden]`` tensors to their outputs, one each."""

    def hook(extra: Tensor) -> Any:
        return lambda layer, given, out: (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

    handles = [layer.register_forward_hook(hook(extra)) for layer, extra in zip(layers, sums)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def outputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Within it, the layers' outputs ``[batch, time, hidden]`` are appended to the list, in the order of their run."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, given, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    try:
        yield found
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
    """Keys and values at the memory tokens of sequences, differentiable; batched equals one by one.

    Args:
        twin: the tuned reader.
        sequences: what to read; the memory tokens stand at their ``places``.
        budget: positions per forward pass, padding included.
    """
    embed = twin.lm.get_input_embeddings()
    out: dict[int, KVSlots] = {}
    for batch in soft_batches(sequences, embed, embed.weight.device, budget=budget):
        layers = cached_layers(twin.decoder, batch.embeds, batch.mask, batch.positions)
        for row, i in enumerate(batch.which):
            out[i] = KVSlots.at(layers, batch.positions, row, sequences[i].places)
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
