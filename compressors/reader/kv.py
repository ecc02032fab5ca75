"""Moves KV passages to new positions and reads them from a cache.

To read a KV passage at other positions than it was computed at, its keys are rotated by the difference (RoPE is a group:
R(a) R(b) = R(a + b)). The passages go to the front of a cache, and a 4-D mask lets each prompt token see only the slots before
it in logical order.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..core.passage import CompressedPassage
from .plan import Layout, PromptPlan

FIXED, FREE, ROTARY = "fixed", "free", "rotary"
_LENGTH_DEPENDENT = {"longrope", "dynamic"}


class KVPlacement:
    """Moves keys of one model to other positions; a probe finds out how, per layer.

    Each layer is ``rotary`` (keys rotate with their position), ``free`` (keys hold no position) or ``fixed`` (keys and values
    mix in the position, as with learned position embeddings, and cannot move).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        if getattr(self.config, "alibi", False):
            raise ValueError("Readers with ALiBi take no KV passages: their attention bias ignores logical positions.")
        self.rotary: Any = getattr(self.decoder, "rotary_emb", None)
        self._apply: Any = getattr(sys.modules[type(self.decoder).__module__], "apply_rotary_pos_emb", None)
        self.types: list[str] = list(getattr(self.config, "layer_types", None) or [])
        self.kinds = self._probe()

    @torch.no_grad()
    def _probe(self) -> list[str]:
        device = self.model.get_input_embeddings().weight.device
        ids = torch.arange(1, 7, device=device)[None] % self.config.vocab_size
        with _same_inputs(self.decoder, self.config.num_hidden_layers):
            here, there = (self._encode(ids, offset) for offset in (0, 5))
        delta = torch.full((ids.shape[1],), 5, device=device)
        close = functools.partial(_close, quantised=getattr(self.model.config, "quantization_config", None) is not None)
        kinds = []
        for layer, ((k0, v0), (k1, v1)) in enumerate(zip(here, there)):
            if not close(v0, v1):
                kinds.append(FIXED)
            elif close(k0, k1):
                kinds.append(FREE)
            else:
                moved = self._try_rotate(k0, delta, layer)
                kinds.append(ROTARY if moved is not None and close(moved, k1) else FIXED)
        return [FIXED] * len(kinds) if FIXED in kinds else kinds

    def _encode(self, ids: Tensor, offset: int) -> list[tuple[Tensor, Tensor]]:
        positions = torch.arange(ids.shape[1], device=ids.device)[None] + offset
        cache = DynamicCache()
        with torch.autocast(
            ids.device.type, enabled=False
        ):  # the first use may be in training, where it would blur the keys
            self.decoder(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                use_cache=True,
                **position_arguments(self.decoder, positions),
            )
        layers: list[Any] = cache.layers
        return [(layer.keys[0], layer.values[0]) for layer in layers]

    def _try_rotate(self, keys: Tensor, delta: Tensor, layer: int) -> Tensor | None:
        if self.rotary is None or self._apply is None:
            return None
        try:
            return self.rotate(keys, delta, layer)
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError):
            return None

    def rotate(self, keys: Tensor, delta: Tensor, layer: int) -> Tensor:
        """Keys ``[kv_heads, slots, head_dim]`` of a layer, moved by ``delta [slots]`` or ``[1]`` positions."""
        wide = keys.float()[None]  # in float32: bfloat16 rotation costs 0.3 %
        extra: dict[str, Any] = {}
        prefix = ""
        if "layer_type" in inspect.signature(self.rotary.forward).parameters:
            extra["layer_type"] = self.types[layer]
            prefix = f"{self.types[layer]}_"
        cos, sin = self.rotary(wide, delta[None], **extra)
        # Yarn and longrope scale cos and sin; the keys were scaled once already.
        scale = getattr(self.rotary, f"{prefix}attention_scaling", 1.0)
        return self._apply(wide, wide, cos / scale, sin / scale)[1][0].to(keys.dtype)

    def place(self, passage: CompressedPassage, start: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[kv_heads, slots, head_dim]`` per layer, moved so that the first slot stands at ``start``.

        Raises:
            ValueError: if this model's keys cannot move and the passage was computed elsewhere, or the layers differ.
        """
        if len(passage.keys or ()) != len(self.kinds):
            raise ValueError(f"The KV passage has {len(passage.keys or ())} layers, the reader {len(self.kinds)}.")
        device = self.device
        home: Any = passage.positions
        delta = torch.arange(start, start + passage.slots, device=device) - home.to(device)
        moves = bool(delta.any())
        if moves:
            self.check_move(int(home[0]), start)
        keys = []
        for layer, k in enumerate(passage.keys or ()):
            k = k.to(device)
            keys.append(self.rotate(k, delta, layer) if moves and self.kinds[layer] == ROTARY else k)
        return keys, [v.to(device) for v in passage.values or ()]

    @property
    def device(self) -> torch.device:
        """Where the reader's prompts are."""
        return self.model.get_input_embeddings().weight.device

    def check_move(self, home: int, start: int) -> None:
        """Raises ``ValueError`` if keys cannot move; ``home`` and ``start`` are where they are and where they should be."""
        if FIXED in self.kinds:
            raise ValueError(
                f"{type(self.model).__name__} mixes positions into its keys (learned positions or an unknown rotation), "
                f"so a KV passage computed at position {home} cannot be read at position {start}; "
                "use an embeds or text method with this reader."
            )

    def check_length(self, length: int) -> None:
        """Refuses prompts whose positions these keys cannot represent. ``length`` counts logical positions."""
        limit = self.rotary_limit
        if limit is not None and length > limit:
            raise ValueError(
                f"With {self._rope_type} RoPE a KV passage can be read in prompts of up to {limit} positions, got {length}; "
                "its keys were rotated with the frequencies of short prompts."
            )
        window = self.window
        if window and length > window:
            raise ValueError(
                f"This reader's sliding window spans {window} positions and the prompt has {length}: KV passages can be "
                "read in prompts of up to one window; use an embeds method for longer ones."
            )

    @property
    def _rope_type(self) -> str:
        return (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")

    @property
    def rotary_limit(self) -> int | None:
        """Positions up to which the rotation's frequencies do not depend on the prompt's length; ``None``: no bound."""
        if self._rope_type not in _LENGTH_DEPENDENT:
            return None
        rope = getattr(self.config, "rope_parameters", None) or {}
        original = getattr(self.config, "original_max_position_embeddings", None)
        return rope.get("original_max_position_embeddings") or original or None

    @property
    def max_length(self) -> int | None:
        """Longest prompt that `check_length` accepts; ``None``: any."""
        return min((n for n in (self.rotary_limit, self.window) if n), default=None)

    @property
    def window(self) -> int | None:
        """Sliding window in positions, if any layer has one."""
        window = getattr(self.config, "sliding_window", None)
        if self.types:
            return window if "sliding_attention" in self.types else None
        return window if getattr(self.config, "use_sliding_window", True) else None

    def mask(self, kv_positions: Tensor, layout: Layout, dtype: torch.dtype) -> Any:
        """The additive mask ``[batch, 1, time, slots + time]`` in logical order (a dict of it where layer types differ).

        Args:
            kv_positions: ``[batch, slots]`` logical position of each cached slot, -1 at padding.
            layout: the prompt tokens that are run.
            dtype: the reader's dtype.
        """
        row = layout.positions[:, :, None]
        past = (kv_positions[:, None, :] >= 0) & (kv_positions[:, None, :] < row)
        time = layout.valid.shape[1]
        causal = torch.ones(time, time, dtype=torch.bool, device=row.device).tril()
        own = causal & layout.valid[:, None, :]
        # A padding row sees itself, so that no softmax runs over nothing.
        own = own | torch.eye(time, dtype=torch.bool, device=row.device)
        allowed = torch.cat([past & layout.valid[:, :, None], own], dim=-1)[:, None]
        return self.additive(allowed, dtype)  # the prompt fits one window (check_length), so all layers see the same

    def additive(self, allowed: Tensor, dtype: torch.dtype) -> Any:
        """A bool mask ``[batch, 1, rows, columns]`` as the model takes it: added to the scores, by layer type where it asks."""
        additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        additive.masked_fill_(~allowed, torch.finfo(dtype).min)
        return dict.fromkeys(set(self.types), additive) if "sliding_attention" in self.types else additive


def join(
    placement: KVPlacement, plans: Sequence[PromptPlan], dtype: torch.dtype, device: torch.device
) -> tuple[DynamicCache, Tensor]:
    """The prompts' KV passages as one cache, and the logical position of every slot.

    Returns:
        A cache whose layers hold ``[batch, kv_heads, slots, head_dim]`` (shorter rows padded with zeros on the left), and
        ``[batch, slots]`` positions, -1 at padding.
    """
    rows: list[tuple[list[Tensor], list[Tensor], Tensor] | None] = []
    for plan in plans:
        placed = [(*placement.place(p, start), torch.arange(start, start + p.slots)) for start, p in plan.kv]
        if not placed:
            rows.append(None)
            continue
        layers = range(len(placement.kinds))
        keys = [torch.cat([keys[i] for keys, _, _ in placed], dim=1) for i in layers]
        values = [torch.cat([values[i] for _, values, _ in placed], dim=1) for i in layers]
        rows.append((keys, values, torch.cat([at for _, _, at in placed])))
    slots = max(0 if row is None else row[2].numel() for row in rows)
    example = next(row for row in rows if row is not None)
    positions = torch.full((len(rows), slots), -1)
    for i, row in enumerate(rows):
        if row is not None:
            positions[i, slots - row[2].numel() :] = row[2]

    def stack(which: int, layer: int) -> Tensor:
        like = example[which][layer]
        out = []
        for row in rows:
            part = like.new_zeros(like.shape[0], 0, like.shape[2]) if row is None else row[which][layer]
            out.append(nn.functional.pad(part, (0, 0, slots - part.shape[1], 0)))
        return torch.stack(out).to(device=device, dtype=dtype)

    stacked: Any = [(stack(0, i), stack(1, i)) for i in range(len(placement.kinds))]
    return DynamicCache(stacked), positions.to(device)


def layer_list(body: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a decoder's layers; an empty list if they are in none."""
    lists = [(name, child) for name, child in body.named_children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=lambda found: len(found[1]), default=("", nn.ModuleList()))


def position_arguments(decoder: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """``position_ids`` for the models that take them (all but the ALiBi ones)."""
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        return {"position_ids": positions}
    return {}


@contextlib.contextmanager
def _same_inputs(decoder: nn.Module, count: int) -> Iterator[None]:
    """Gives all layers but the first the hidden states of their first call in every later call of this thread.

    Rounding grows from layer to layer (in bfloat16 to 18 % of a value in 30 of them), and would hide how positions enter one.
    """
    lists = [part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    own = threading.get_ident()
    first: dict[nn.Module, Any] = {}

    def replay(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != own:
            return None
        if args:
            return (first.setdefault(layer, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": first.setdefault(layer, kwargs["hidden_states"])}

    hooks = [layer.register_forward_pre_hook(replay, with_kwargs=True) for layer in (lists[0][1:] if lists else ())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _close(a: Tensor, b: Tensor, quantised: bool) -> bool:
    if quantised:  # int8 activations round differently at each position; a position mixed in changes far more
        return float((a - b).float().norm()) <= 0.2 * float(a.float().norm())
    # Of the largest value. A position that is mixed in changes far more.
    tolerance = {torch.float32: 2e-3, torch.float64: 1e-6}.get(a.dtype, 3e-2)
    return bool(torch.allclose(a.float(), b.float(), atol=tolerance * max(1.0, float(a.abs().max())), rtol=0))
