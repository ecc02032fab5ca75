"""Fingerprints: short hashes of weights, configs and tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

LENGTH = 32  # hexadecimal digits: 128 bits
_CHUNK = 1 << 24  # elements hashed at a time


def canonical(tensor: Tensor) -> Tensor:
    """Casts a floating tensor to bfloat16 if that is exact, else to float32.

    Loading bfloat16 weights as float32 thus changes no fingerprint.
    """
    if not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
        return tensor
    wide = tensor.to(torch.float32)
    narrow = wide.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(torch.float32), wide) else wide


def hash_json(*parts: Any) -> str:
    """Hashes JSON-able values, independent of key order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:LENGTH]


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hashes names, shapes and values of tensors, independent of dtype and device. About 1 GB per second on one core."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = canonical(tensor.detach()).reshape(-1)
        digest.update(str(flat.dtype).encode())
        for chunk in flat.split(_CHUNK) if flat.numel() else ():
            digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops second names of the same storage (tied embeddings), so that tying changes no hash."""
    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    kept: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name]
        key = (tensor.data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        kept[name] = tensor
    return kept
