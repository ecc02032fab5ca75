"""Attention over keys and values that stand outside the model's cache, through `transformers.AttentionInterface`.

Ragged KV passages need a bias per head and key, and another length in every layer. The model's own cache and masks have
room for neither. So the passages stay out of both: each layer's attention function gets the passages' pairs in front of
the model's own, with one mask for all, and calls the implementation that the model was loaded with.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..core.passage import CompressedPassage
from ..core.ragged import pad_heads
from .kv import ROTARY, KVPlacement
from .plan import PromptPlan

IMPLEMENTATIONS = ("sdpa", "eager")  # those that add a mask to the scores
_PREFIX = "nutgraf_"
_LATER = 2**40  # a position after any prompt


class Door(Protocol):
    """Sees, and may change, what every layer attends to."""

    def enter(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask that a layer is to use.

        Args:
            layer: its number.
            query: ``[batch, heads, time, head_dim]``, rotated.
            key, value: ``[batch, kv_heads, length, head_dim]``, rotated.
            mask: what the model made: additive or bool, ``[batch or 1, 1, time, length or more]``, or ``None``.
            options: the layer's other settings, such as ``scaling`` and ``softcap``.
        """
        ...


_open: ContextVar[Door | None] = ContextVar("open", default=None)
_lock = threading.Lock()
_users: dict[int, int] = {}  # models by id, with the number of reads that use a door now


@contextlib.contextmanager
def attending(model: Any, door: Door | None) -> Iterator[None]:
    """Runs a model's layers through a door; without one the model is left as it is.

    Other threads may run the model at the same time: they get its own implementation, with its own arguments.

    Raises:
        ValueError: if the model's attention cannot be reached.
    """
    if door is None:
        yield
        return
    with _lock:
        own = check_reachable(model)
        if not _users.get(id(model)):
            model.set_attn_implementation(_PREFIX + own)
        _users[id(model)] = _users.get(id(model), 0) + 1
    token = _open.set(door)
    try:
        yield
    finally:
        _open.reset(token)
        with _lock:
            _users[id(model)] -= 1
            if not _users[id(model)]:
                del _users[id(model)]
                model.set_attn_implementation(own)


def check_reachable(model: Any) -> str:
    """The attention implementation of a model; raises ``ValueError`` if `attending` cannot reach its layers."""
    own = str(model.config._attn_implementation).removeprefix(_PREFIX)
    if own not in IMPLEMENTATIONS or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} with attention {own!r} reads no KV passages that differ from head to head: its "
            "attention must go through transformers.AttentionInterface, as sdpa or eager (from_pretrained(..., "
            'attn_implementation="sdpa")); use an embeds or text method with this reader otherwise.'
        )
    return own


def _register(name: str) -> None:
    functions, masks = AttentionInterface(), AttentionMaskInterface()

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        door = _open.get()
        if door is not None:
            key, value, attention_mask = door.enter(module.layer_idx, query, key, value, attention_mask, options)
        # eager attention is a function of the model's own module
        own = functions.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(_PREFIX + name, attend)
    AttentionMaskInterface.register(_PREFIX + name, masks[name])


for _name in IMPLEMENTATIONS:
    _register(_name)


class Prefix:
    """The KV passages of a batch of prompts: pairs that every layer attends to besides its own.

    Args:
        placement: moves keys to their places.
        plans: the prompts; at least one holds a KV passage.
        rows: ``[batch, time]`` logical positions of the tokens that are run, on the reader's device.

    Raises:
        ValueError: if a passage has other layers than the reader, or its keys cannot move.
    """

    def __init__(self, placement: KVPlacement, plans: Sequence[PromptPlan], rows: Tensor) -> None:
        self.rows = rows
        placed = [[(start, _pairs(placement, passage, start)) for start, passage in plan.kv] for plan in plans]
        self.layers = [
            _stack([[(start, *pairs[layer]) for start, pairs in row] for row in placed], rows.device)
            for layer in range(len(placement.kinds))
        ]

    def enter(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts the passages' pairs in front; see `Door.enter`."""
        keys, values, bias, starts = self.layers[layer]
        if keys.shape[1] != key.shape[1]:
            raise ValueError(f"Layer {layer} of the KV passages has {keys.shape[1]} heads, the reader {key.shape[1]}.")
        (batch, heads, time, _), length, rows = query.shape, key.shape[2], self.rows
        if beams := batch // len(rows) - 1:
            keys, values, bias, starts, rows = (
                t.repeat_interleave(beams + 1, 0) for t in (keys, values, bias, starts, rows)
            )
        first = length - time  # tokens in the model's own cache
        rows = rows[:, first : first + time]
        rows = nn.functional.pad(rows, (0, time - rows.shape[1]), value=_LATER)  # the answer's tokens see all
        low = torch.finfo(query.dtype).min
        past = bias[:, :, None].masked_fill((starts[:, None] >= rows[:, :, None])[:, None], low)
        past = past.repeat_interleave(heads // past.shape[1], dim=1)
        own = _additive(mask, time, length, low, query).expand(batch, heads, -1, -1)
        joined = torch.cat([past.to(query.dtype), own], dim=-1)
        return torch.cat([keys.to(key.dtype), key], 2), torch.cat([values.to(value.dtype), value], 2), joined


def _additive(mask: Tensor | None, time: int, length: int, low: float, like: Tensor) -> Tensor:
    """The model's own mask ``[batch or 1, 1, time, length]`` as numbers to add."""
    if mask is None:
        mask = torch.ones(time, length, dtype=torch.bool, device=like.device).tril(length - time)[None, None]
    mask = mask[..., :length]
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, low) if mask.dtype == torch.bool else mask


def _pairs(placement: KVPlacement, passage: CompressedPassage, start: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer: keys moved to ``start`` and values ``[kv_heads, pairs, head_dim]``, and bias ``[kv_heads, pairs]``."""
    if passage.counts is None or passage.span is None or not passage.keys or not passage.values:
        dense = zip(*placement.place(passage, start))
        return [(k, v, torch.zeros(k.shape[:2], device=k.device)) for k, v in dense]
    counts, device = passage.counts, placement.device
    if len(counts) != len(placement.kinds):
        raise ValueError(f"The KV passage has {len(counts)} layers, the reader {len(placement.kinds)}.")
    delta = torch.tensor([start - passage.span[0]], device=device)
    placement.check_move(passage.span[0], start)
    sizes = counts.sum(1).tolist()
    keys, values = passage.keys[0].to(device), passage.values[0].to(device)
    bias = torch.zeros(len(keys), device=device) if passage.bias is None else passage.bias.to(device).float()
    out = []
    for layer, (k, v, b) in enumerate(zip(keys.split(sizes), values.split(sizes), bias.split(sizes))):
        if placement.kinds[layer] == ROTARY and start != passage.span[0]:
            k = placement.rotate(k[None], delta, layer)[0]
        heads = counts[layer]
        out.append((pad_heads(k, heads), pad_heads(v, heads), pad_heads(b, heads, torch.finfo(b.dtype).min)))
    return out


def _stack(
    rows: Sequence[Sequence[tuple[int, Tensor, Tensor, Tensor]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of a batch.

    Returns:
        Keys and values ``[batch, kv_heads, pairs, head_dim]``, bias ``[batch, kv_heads, pairs]`` and the first position
        ``[batch, pairs]`` of each pair's passage; shorter rows are padded at the end.
    """
    widths = [sum(part[1].shape[1] for part in row) for row in rows]
    longest = max(widths)
    _, key, value, _ = next(part for row in rows for part in row)
    heads = key.shape[0]
    keys = key.new_zeros(len(rows), heads, longest, key.shape[2])
    values = value.new_zeros(len(rows), heads, longest, value.shape[2])
    bias = torch.full((len(rows), heads, longest), torch.finfo(torch.float32).min, device=device)
    starts = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    for i, (row, n) in enumerate(zip(rows, widths)):
        if not row:
            continue
        if bad := [part[1].shape[0] for part in row if part[1].shape[0] != heads]:
            raise ValueError(f"The KV passages of a batch must have the same heads, got {heads} and {bad[0]}.")
        keys[i, :, :n] = torch.cat([part[1] for part in row], 1)
        values[i, :, :n] = torch.cat([part[2] for part in row], 1)
        bias[i, :, :n] = torch.cat([part[3] for part in row], 1)
        starts[i, :n] = torch.cat([torch.full((part[1].shape[1],), part[0], device=device) for part in row])
    return keys, values, bias, starts
