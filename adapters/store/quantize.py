"""Symmetric linear quantisation to 8 or 4 bits, with one float16 scale per group of dimensions.

A group is ``group`` neighbouring numbers of the last axis (the last group may be shorter). With ``q = 127`` levels each way
for 8 bits and 7 for 4, a group whose largest number has magnitude ``a`` gets the smallest float16 scale ``s >= a / q``, and

    |x - s * round(x / s)| <= s / 2,   where s <= (a / q) * (1 + 2**-10) + 2**-24.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Quantisation = Literal["int8", "int4"]
LEVELS: dict[str, int] = {"int8": 127, "int4": 7}
_LARGEST = float(np.finfo(np.float16).max)


class Quantised(NamedTuple):
    """int8 ``[..., g, group]`` (4 bits: two per byte, ``[..., g, ceil(group / 2)]``) and float16 scales ``[..., g]``."""

    numbers: Tensor
    scales: Tensor


def quantise(tensor: Tensor, kind: Quantisation, group: int) -> Quantised:
    """Quantise the last axis of a finite tensor ``[..., d]``; ``group`` numbers share a scale.

    Raises:
        ValueError: if a number is too large for a float16 scale, NaN or infinite.
    """
    levels = LEVELS[kind]
    wide = tensor.detach().cpu().to(torch.float32)
    short = -wide.shape[-1] % group
    grouped = torch.nn.functional.pad(wide, (0, short)).unflatten(-1, (-1, group))
    largest = grouped.abs().amax(-1)
    if largest.numel() and not bool((largest <= _LARGEST * levels).all()):
        raise ValueError(
            f"A slot holds numbers up to {largest.max().item():g}, which {kind} cannot hold with float16 scales; "
            "store these passages without quantisation."
        )
    scales = _round_up(largest / levels)
    divisor = scales.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    numbers = (grouped / divisor).round().clamp(-levels, levels).to(torch.int8)
    return Quantised(_pack(numbers) if kind == "int4" else numbers, scales)


def dequantise(
    quantised: Quantised, kind: Quantisation, group: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Restore the numbers, ``[..., width]``; ``kind``, ``group`` and ``width`` as in `quantise`."""
    numbers, scales = quantised
    if kind == "int4":
        numbers = _unpack(numbers, group)
    # bfloat16 cannot hold a float16 scale exactly
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    wide = (numbers * scales.to(exact)[..., None]).flatten(-2)
    return wide[..., :width].contiguous().to(dtype)


def groups(width: int, group: int) -> int:
    """Number of groups in a row of ``width`` numbers."""
    return -(-width // group)


def _round_up(scales: Tensor) -> Tensor:
    """Round up to float16: a scale rounded down would clip the group's largest number."""
    half = scales.to(torch.float16)
    up = torch.from_numpy(np.nextafter(half.numpy(), np.float16(np.inf)))
    return torch.where(half.to(torch.float32) < scales, up, half)


def _pack(numbers: Tensor) -> Tensor:
    pairs = torch.nn.functional.pad(numbers, (0, numbers.shape[-1] % 2))
    return pairs[..., 0::2] & 15 | pairs[..., 1::2] << 4


def _unpack(packed: Tensor, group: int) -> Tensor:
    pairs = torch.stack((packed << 4 >> 4, packed >> 4), dim=-1).flatten(-2)  # shifts of int8 keep the sign
    return pairs[..., :group]
