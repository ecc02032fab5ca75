"""Defences that change what is stored, to be measured like everything else.

None of them needs a key to be read back but the rotation, and none replaces encryption (`nutgraf.adapters.store.encryption`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.store.codec import Encoding, round_trip
from ...compressors import CompressedPassage
from .attacker import Stolen
from .targets import Target

DEFENCES = "noise=SIZE (in standard deviations of a tensor), int8, int4, rotation (of retrieval vectors)"


def defended(target: Target, defence: str, seed: int = 0) -> Target:
    """The target after a defence, named as in `DEFENCES`.

    Raises:
        ValueError: for an unknown defence, or one that does not apply to the target.
    """
    name, _, size = defence.partition("=")
    every = [*target.stolen, *(one for _, one in target.leaked)]  # what leaked was stored with the same defence
    draw = torch.Generator().manual_seed(seed)
    if name == "noise":
        scale = _size(size, defence)
        changed = [_map(one, lambda t: noisy(t, scale, draw)) for one in every]
    elif defence in ("int8", "int4"):
        encoding = Encoding(quantize=defence)  # type: ignore[arg-type]
        changed = [_rounded(one, encoding, target) for one in every]
    elif defence == "rotation":
        changed = _rotated(target, every, draw)
    else:
        raise ValueError(f"There is no defence {defence!r}; there are {DEFENCES}.")
    count = len(target.stolen)
    leaked = [(text, one) for (text, _), one in zip(target.leaked, changed[count:])]
    return replace(target, stolen=changed[:count], leaked=leaked, defence=defence)


def noisy(tensor: Tensor, scale: float, draw: torch.Generator) -> Tensor:
    """The tensor with Gaussian noise of `scale` times its standard deviation; integers stay."""
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor
    wide = tensor.float()
    return (wide + scale * wide.std() * torch.randn(wide.shape, generator=draw).to(wide.device)).to(tensor.dtype)


def _map(one: Stolen, change: Callable[[Tensor], Tensor]) -> Stolen:
    return one.map(change) if isinstance(one, CompressedPassage) else change(one)


def _rounded(one: Stolen, encoding: Encoding, target: Target) -> Stolen:
    if not isinstance(one, CompressedPassage) or one.interface == "text":
        raise ValueError(
            f"{encoding.quantize} is a store's rounding of slots; {target.label} holds {target.interface}."
        )
    return round_trip(one, encoding)[0]


def _rotated(target: Target, every: list[Stolen], draw: torch.Generator) -> list[Stolen]:
    """All vectors times one secret orthogonal matrix, which keeps their dot products."""
    if target.interface != "vector":
        raise ValueError(
            f"A secret rotation is a defence of retrieval vectors; {target.label} holds {target.interface}."
        )
    width = target.stolen[0].shape[-1]  # type: ignore[union-attr]
    secret, _ = torch.linalg.qr(torch.randn(width, width, generator=draw))
    return [one @ secret for one in every if isinstance(one, Tensor)]


def _size(size: str, defence: str) -> float:
    try:
        found = float(size)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise ValueError(f"Noise is written noise=SIZE, such as noise=0.5, with a size of at least 0; got {defence!r}.")
    return found
