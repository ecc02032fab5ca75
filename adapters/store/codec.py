"""Encode a compressed passage as a JSON header and one run of bytes for its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compressors import CompressedPassage
from .base import StoreError
from .quantize import LEVELS, Quantisation, Quantised, dequantise, groups, quantise

ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element's size
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int32)
}
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Encoding:
    """Storage format of slots.

    Attributes:
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; ``None``: as the compressor made them.
        quantize: ``"int8"`` or ``"int4"``; read back in the original dtype.
        group: neighbouring dimensions that share a scale (see `nutgraf.adapters.store.quantize`).

    Raises:
        ValueError: for other values, or if both dtype and quantize are given.
    """

    dtype: str | None = None
    quantize: Quantisation | None = None
    group: int = 64

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _FLOATS:
            raise ValueError(
                f"Slots are stored as {', '.join(_FLOATS)} or as they were made, got dtype={self.dtype!r}."
            )
        if self.quantize is not None and self.quantize not in LEVELS:
            raise ValueError(f"quantize must be one of {sorted(LEVELS)} or None, got {self.quantize!r}.")
        if self.dtype is not None and self.quantize is not None:
            raise ValueError(f"Give dtype or quantize, not both: got {self.dtype!r} and {self.quantize!r}.")
        if not 2 <= self.group <= 4096:
            raise ValueError(f"A group holds 2 to 4096 dimensions, got {self.group}.")

    def __str__(self) -> str:
        return f"{self.quantize}, groups of {self.group}" if self.quantize else self.dtype or "as made"


def encode(passage: CompressedPassage, encoding: Encoding) -> tuple[str, bytes]:
    """Return a passage's JSON header and its tensors' bytes.

    Raises:
        ValueError: if its numbers do not fit the encoding (for instance too large for float16).
    """
    run = bytearray()
    specs = [_write(run, name, tensor, encoding) for name, tensor in passage.tensors().items()]
    header = passage.facts() | {"tensors": specs}
    if encoding.quantize and specs:
        header["info"]["quantized"] = encoding.quantize
    return json.dumps(header), bytes(run)


def decode(header: Mapping[str, Any], data: Any) -> CompressedPassage:
    """Return the passage of a parsed header and its bytes; unquantised tensors are views of ``data``, a writable buffer.

    Raises:
        StoreError: if header and bytes do not match.
    """
    try:
        tensors = {spec["name"]: _read(data, spec) for spec in header["tensors"]}
        return CompressedPassage.assemble(header, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"A stored passage's header does not fit its bytes: {error!r}.") from error


def round_trip(passage: CompressedPassage, encoding: Encoding) -> tuple[CompressedPassage, int]:
    """Return the passage as a store with this encoding returns it, and its stored bytes.

    Raises:
        ValueError: if its numbers do not fit the encoding.
    """
    header, data = encode(passage, encoding)
    return decode(json.loads(header), bytearray(data)), len(data)


def _write(run: bytearray, name: str, tensor: Tensor, encoding: Encoding) -> dict[str, Any]:
    """Append a tensor to the run of bytes and return its description."""
    made = str(tensor.dtype).removeprefix("torch.")
    if made not in _DTYPES:
        raise ValueError(f"A store holds {', '.join(_DTYPES)}, but the passage's {name} are {made}.")
    spec: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": made}
    if not tensor.is_floating_point():
        return spec | {"at": _append(run, tensor)}
    if encoding.quantize is not None and tensor.dim() > 1:  # a bias stays exact: it is one number per pair
        group = min(encoding.group, max(tensor.shape[-1], 2))
        quantised = quantise(tensor, encoding.quantize, group)
        largest = quantised.scales.float().max().item() * LEVELS[encoding.quantize] if tensor.numel() else 0.0
        if largest > torch.finfo(tensor.dtype).max:
            raise ValueError(
                f"The passage's {name} are too near the end of {made} to be quantised; store them as made."
            )
        spec |= {"quantize": encoding.quantize, "group": group}
        return spec | {"at": _append(run, quantised.numbers), "scales_at": _append(run, quantised.scales)}
    if encoding.dtype is not None:
        tensor = tensor.to(_DTYPES[encoding.dtype])
        spec["dtype"] = encoding.dtype
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"The passage's {name} do not fit {encoding.dtype}; store them as bfloat16 or float32.")
    return spec | {"at": _append(run, tensor)}


def _append(run: bytearray, tensor: Tensor) -> int:
    run.extend(bytes(-len(run) % ALIGNMENT))
    start = len(run)
    run.extend(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return start


def _read(data: Any, spec: Mapping[str, Any]) -> Tensor:
    shape, dtype = spec["shape"], _DTYPES[spec["dtype"]]
    kind = spec.get("quantize")
    if kind is None:
        return _view(data, spec["at"], dtype, shape)
    group, (*rows, width) = spec["group"], shape
    count = groups(width, group)
    size = group if kind == "int8" else -(-group // 2)
    numbers = _view(data, spec["at"], torch.int8, [*rows, count, size])
    scales = _view(data, spec["scales_at"], torch.float16, [*rows, count])
    return dequantise(Quantised(numbers, scales), kind, group, width, dtype)


def _view(data: Any, start: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)
