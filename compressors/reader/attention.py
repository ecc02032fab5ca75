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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..core.passage import CompressedPassage
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

    @torch.compiler.disable  # a compiled model would not see that the door changes
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *more: Any, **options: Any
    ) -> Any:
        door = _open.get()
        if door is not None:
            key, value, attention_mask = door.enter(module.layer_idx, query, key, value, attention_mask, options)
        # eager attention is a function of the model's own module
        own = functions.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, *more, **options)

    AttentionInterface.register(_PREFIX + name, attend)
    AttentionMaskInterface.register(_PREFIX + name, masks[name])


for _name in IMPLEMENTATIONS:
    _register(_name)


@dataclass
class _Part:
    """One KV passage of a batch: its pairs layer by layer, head after head.

    Attributes:
        row: of the batch.
        start: first position in the prompt.
        counts: ``[layers, kv_heads]`` pairs, on the CPU.
        keys, values, bias: of each layer ``[pairs, head_dim]`` and ``[pairs]``.
        shift: of each layer ``[pairs]``, the positions by which the keys move, on the CPU.
    """

    row: int
    start: int
    counts: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Sequence[Tensor]
    shift: Sequence[Tensor]

    @classmethod
    def of(cls, placement: KVPlacement, row: int, start: int, passage: CompressedPassage) -> _Part:
        """Takes a dense or ragged passage apart; raises ``ValueError`` if the reader has other layers or fixed keys."""
        keys, values, home = passage.keys or (), passage.values or (), passage.positions
        if passage.counts is not None and passage.span is not None:
            counts = passage.counts.cpu().long()
            sizes = counts.sum(1).tolist()
            shift = [torch.full((n,), start - passage.span[0]) for n in sizes]
            bias = keys[0].new_zeros(len(keys[0])) if passage.bias is None else passage.bias
            pairs = keys[0].split(sizes), values[0].split(sizes), bias.split(sizes)
        else:
            counts = torch.tensor([[k.shape[1]] * k.shape[0] for k in keys])
            moves = torch.arange(start, start + passage.slots) - home.cpu()  # type: ignore[union-attr]
            shift = [moves.repeat(k.shape[0]) for k in keys]
            pairs = (
                tuple(k.flatten(0, 1) for k in keys),
                tuple(v.flatten(0, 1) for v in values),
                tuple(k.new_zeros(k.shape[:2]).flatten() for k in keys),
            )
        if len(counts) != len(placement.kinds):
            raise ValueError(f"The KV passage has {len(counts)} layers, the reader {len(placement.kinds)}.")
        if any(bool(moved.any()) for moved in shift[:1]):
            placement.check_move(int(home[0]) if passage.span is None else passage.span[0], start)  # type: ignore[index]
        return cls(row, start, counts, *pairs, shift)

    def places(self, offset: Tensor, widths: Tensor) -> tuple[Tensor, ...]:
        """Of each layer ``[pairs]`` indices into ``batch x kv_heads x width``, given ``[layers]`` offsets and widths."""
        layers, heads = self.counts.shape
        each = self.counts.flatten()
        layer = torch.arange(layers).repeat_interleave(heads).repeat_interleave(each)
        head = torch.arange(heads).repeat(layers).repeat_interleave(each)
        within = torch.arange(len(layer)) - (each.cumsum(0) - each).repeat_interleave(each)
        found = (self.row * heads + head) * widths[layer] + offset[layer] + within
        return found.split(self.counts.sum(1).tolist())


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
        self._later: dict[int, Tensor] = {}  # of each layer, what `_seen` gives after the prompt
        self._step: tuple[Any, ...] = ()
        self._masks: dict[int, tuple[Tensor | None, Tensor]] = {}  # the model's masks of a step, by id
        parts = [
            _Part.of(placement, row, start, passage) for row, plan in enumerate(plans) for start, passage in plan.kv
        ]
        heads = parts[0].counts.shape[1]
        if bad := [part.counts.shape[1] for part in parts if part.counts.shape[1] != heads]:
            raise ValueError(f"The KV passages of a batch must have the same heads, got {heads} and {bad[0]}.")
        # Columns of a layer: the passages of a row stand one after another, each as wide as its longest head.
        widths = torch.zeros(len(plans), len(placement.kinds), dtype=torch.long)
        offsets = []
        for part in parts:
            offsets.append(widths[part.row].clone())
            widths[part.row] += part.counts.amax(1)
        widest = widths.amax(0)
        where = [part.places(offset, widest) for part, offset in zip(parts, offsets)]
        self.layers = [
            self._layer(placement, parts, [places[layer] for places in where], layer, int(widest[layer]))
            for layer in range(len(placement.kinds))
        ]

    def _layer(
        self, placement: KVPlacement, parts: Sequence[_Part], where: Sequence[Tensor], layer: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, width, head_dim]``, bias and first positions ``[batch, kv_heads, width]``."""
        device, places = self.rows.device, torch.cat(list(where)).to(self.rows.device)
        keys, values, bias = (
            torch.cat([pairs[layer].to(device) for pairs in kind])
            for kind in zip(*[(part.keys, part.values, part.bias) for part in parts])
        )
        shift = torch.cat([part.shift[layer] for part in parts])
        if placement.kinds[layer] == ROTARY and bool(shift.any()):
            keys = placement.rotate(keys[None], shift.to(device), layer)[0]
        starts = torch.cat([torch.full((len(at),), part.start) for part, at in zip(parts, where)]).to(device)

        def spread(flat: Tensor, fill: float = 0.0) -> Tensor:
            whole = flat.new_full((len(self.rows) * parts[0].counts.shape[1] * width, *flat.shape[1:]), fill)
            return whole.index_copy(0, places, flat).view(len(self.rows), -1, width, *flat.shape[1:])

        return spread(keys), spread(values), spread(bias.float(), torch.finfo(torch.float32).min), spread(starts)

    def enter(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts the passages' pairs in front; see `Door.enter`."""
        keys, values, bias, starts = self.layers[layer]
        if keys.shape[1] != key.shape[1]:
            raise ValueError(f"Layer {layer} of the KV passages has {keys.shape[1]} heads, the reader {key.shape[1]}.")
        (batch, heads, time, _), length = query.shape, key.shape[2]
        beams = batch // len(self.rows)
        if beams > 1:
            keys, values = keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0)
        first = length - time  # tokens in the model's own cache
        if first < self.rows.shape[1]:
            rows = self.rows[:, first : first + time]
            rows = nn.functional.pad(rows, (0, time - rows.shape[1]), value=_LATER)
            past = self._seen(bias, starts, rows, beams, query)
        else:  # the answer's tokens see every passage: one bias for all steps
            if layer not in self._later or self._later[layer].shape[:2] != (batch, heads):
                rows = self.rows.new_full((len(self.rows), 1), _LATER)
                self._later[layer] = self._seen(bias, starts, rows, beams, query)
            past = self._later[layer].expand(-1, -1, time, -1)
        own = self._own(mask, time, length, query).expand(batch, heads, -1, -1)
        return torch.cat([keys.to(key), key], 2), torch.cat([values.to(value), value], 2), torch.cat([past, own], -1)

    def _seen(self, bias: Tensor, starts: Tensor, rows: Tensor, beams: int, query: Tensor) -> Tensor:
        """What is added to the passages' scores, ``[batch, heads, time, width]``; `rows` are positions ``[batch, time]``."""
        low = torch.finfo(query.dtype).min
        bias = bias.to(torch.promote_types(bias.dtype, query.dtype))
        past = bias[:, :, None].masked_fill(starts[:, :, None] >= rows[:, None, :, None], low).clamp(min=low)
        return past.repeat_interleave(query.shape[1] // past.shape[1], 1).repeat_interleave(beams, 0).to(query)

    def _own(self, mask: Tensor | None, time: int, length: int, query: Tensor) -> Tensor:
        """The model's own mask as numbers, made once for all layers that get the same one."""
        step = (time, length, query.dtype, query.device)
        if self._step != step:
            self._step, self._masks = step, {}
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, _additive(mask, time, length, torch.finfo(query.dtype).min, query))
        return self._masks[id(mask)][1]


def _additive(mask: Tensor | None, time: int, length: int, low: float, like: Tensor) -> Tensor:
    """The model's own mask ``[batch or 1, 1, time, length]`` as numbers to add."""
    if mask is None:
        mask = torch.ones(time, length, dtype=torch.bool, device=like.device).tril(length - time)[None, None]
    mask = mask[..., :length]
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, low) if mask.dtype == torch.bool else mask
