"""The exact attack on keys: in the first layer a key depends on its token and position alone.

The position is stored, so the rotation can be undone. What is left is one row of a table with a row per token of the
vocabulary (Shadow in the Cache, arXiv 2508.09442, inverts the matrix instead; with grouped heads that finds few tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...compressors import CompressedPassage, Reader
from ...compressors.reader.kv import FIXED, ROTARY, layer_list, position_arguments
from .attacker import Attacker, Stolen, register_attacker

POSITIONS = 512  # whose distances to all tokens exist at the same time


class Keys(NamedTuple):
    """Keys of one head: ``[n]`` positions in the passage, and ``[n, head_dim]`` keys without their rotation, in float32."""

    layer: int
    head: int
    at: Tensor
    keys: Tensor


def stored_keys(passage: CompressedPassage, reader: Reader, layers: range) -> Iterator[Keys]:
    """The stored keys of some layers, head by head, with their rotation undone."""
    placement, positions = reader.kv_placement, passage.positions
    if positions is None or not passage.keys:
        return
    positions = positions.long().cpu()
    start = passage.span[0] if passage.span else int(positions.min()) if len(positions) else 0
    counts = passage.counts
    ends = None if counts is None else counts.flatten().cumsum(0).tolist()
    for layer in layers:
        heads = counts.shape[1] if counts is not None else passage.keys[layer].shape[0]
        for head in range(heads):
            if counts is not None and ends is not None:
                end = ends[layer * heads + head]
                part = slice(end - int(counts[layer, head]), end)
                keys, at = passage.keys[0][part], positions[part]
            else:
                keys, at = passage.keys[layer][head], positions
            keys = keys.float().to(reader.device)
            if len(at) and placement.kinds[layer] == ROTARY:
                keys = placement.rotate(keys[None], -at.to(reader.device), layer)[0]
            yield Keys(layer, head, at - start, keys)


class _EnoughError(Exception):
    """Ends a forward pass after the first layer."""


@torch.no_grad()
def first_layer_keys(reader: Reader, chunk: int = 4096) -> Tensor:
    """``[kv_heads, vocabulary, head_dim]``: the first layer's key of every token, without rotation, in float32."""
    decoder = reader.model.get_decoder()

    def stop(layer: nn.Module, args: object) -> None:
        raise _EnoughError

    _, layers = layer_list(decoder)
    hooks = [layers[1].register_forward_pre_hook(stop)] if len(layers) > 1 else []
    out = []
    try:
        for start in range(0, reader.vocab_size, chunk):
            ids = torch.arange(start, min(start + chunk, reader.vocab_size), device=reader.device)[:, None]
            cache = DynamicCache()
            with contextlib.suppress(_EnoughError):
                decoder(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    use_cache=True,
                    **position_arguments(decoder, torch.zeros_like(ids)),
                )
            first: Any = cache.layers[0]
            out.append(first.keys[:, :, 0].float())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(out).transpose(0, 1)


def add_distances(total: Tensor, rows: Tensor, keys: Tensor, table: Tensor) -> None:
    """Adds the squared distances of ``[n, d]`` keys to the ``[vocabulary, d]`` table to rows of ``[positions, vocabulary]``."""
    found = torch.addmm(table.square().sum(-1), keys, table.T, alpha=-2)
    total.index_add_(0, rows, found + keys.square().sum(-1, keepdim=True))


@register_attacker
class KVLookup(Attacker):
    """Looks up the first layer's keys, dense or ragged, of any rotary reader; the heads of a position vote.

    Reads every token whose first key is stored. Tokens that a passage keeps as ids (`first`) are read as they are.

    Raises:
        ValueError: if the reader mixes positions into its keys.
    """

    name: ClassVar[str] = "kv-lookup"
    title: ClassVar[str] = "first layer's keys"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        if FIXED in reader.kv_placement.kinds:
            raise ValueError(
                f"{type(reader.model).__name__} adds learned positions to its tokens, which this attack cannot undo; it "
                "needs a rotary reader."
            )
        self._table: Tensor | None = None

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return isinstance(stolen, CompressedPassage) and stolen.interface == "kv"

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        return [self.text(one, self.tokens(one)) for one in stolen if isinstance(one, CompressedPassage)]

    @torch.no_grad()
    def tokens(self, passage: CompressedPassage) -> dict[int, int]:
        """Tokens by their position in the passage, after its `first` tokens."""
        if self._table is None:
            self._table = first_layer_keys(self.reader)
        heads = list(stored_keys(passage, self.reader, range(1)))
        places = torch.cat([found.at for found in heads]).unique() if heads else torch.zeros(0, dtype=torch.long)
        out: dict[int, int] = {}
        for part in places.split(POSITIONS):
            total = torch.zeros(len(part), self._table.shape[1], device=self.reader.device)
            for found in heads:
                mine = torch.isin(found.at, part)
                rows = torch.searchsorted(part, found.at[mine]).to(total.device)
                add_distances(total, rows, found.keys[mine.to(total.device)], self._table[found.head])
            out |= zip(part.tolist(), total.argmin(-1).tolist())
        return out

    def text(self, passage: CompressedPassage, tokens: dict[int, int]) -> str:
        """Text of the tokens in order; runs of neighbours are joined, gaps become spaces."""
        runs: list[list[int]] = [list(passage.first)]
        last = -1
        for place in sorted(tokens):
            if place != last + 1:
                runs.append([])
            runs[-1].append(tokens[place])
            last = place
        return " ".join(text for run in runs if (text := self.reader.decode(run).strip()))
