"""Decode tensors from clients safely.

Two formats in base64: a ``torch.save`` file with one dense tensor (vLLM's format; loaded by PyTorch's restricted unpickler,
``weights_only=True``) and a safetensors file with one tensor. Sizes are checked first.
"""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from .errors import RequestError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OVERHEAD = 65_536  # bytes of a file beside its numbers
_ZIP, _WIDEST = b"PK\x03\x04", 4


def decode_embeds(data: Any, width: int, max_rows: int, *, param: str = "prompt_embeds") -> Tensor:
    """Decode base64 into a dense, finite CPU tensor ``[1 to max_rows, width]`` of float32, float16 or bfloat16.

    Raises:
        RequestError: for anything else; the message names the request's field ``param``.
    """

    def refuse(what: str) -> RequestError:
        return RequestError(f"{param} {what}", 400, param)

    if not isinstance(data, str):
        raise refuse(f"must be a base64 string, got {type(data).__name__}.")
    room = max_rows * width * _WIDEST + _OVERHEAD
    if len(data) > room * 4 // 3 + 4:
        raise refuse(f"holds {len(data):,} characters, more than {max_rows} rows of {width} numbers take.")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(f"is not base64: {error}.") from error
    tensor = _from_torch(raw, room, refuse) if raw.startswith(_ZIP) else _from_safetensors(raw, refuse)
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        layout = getattr(tensor, "layout", None)
        raise refuse(f"must hold one dense tensor, got {type(tensor).__name__}{f' ({layout})' if layout else ''}.")
    if tensor.device.type != "cpu":
        raise refuse(f"must hold a CPU tensor, got one on {tensor.device.type!r}.")
    if tensor.dtype not in _DTYPES:
        raise refuse(f"must be float32, float16 or bfloat16, got {str(tensor.dtype).removeprefix('torch.')}.")
    shape = tuple(tensor.shape)
    if tensor.dim() == 3 and shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 2 or tensor.shape[1] != width or not 1 <= tensor.shape[0] <= max_rows:
        raise refuse(f"must have the shape [1 to {max_rows}, {width}], got {list(shape)}.")
    # After the checks: a view can claim many more numbers than the file has.
    tensor = tensor.detach().contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise refuse("holds NaN or infinite numbers.")
    return tensor


def _from_torch(raw: bytes, room: int, refuse: Any) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > room:
            raise refuse("is packed, or larger when unpacked than the tensor may be; write it with torch.save.")
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise refuse("is a TorchScript archive; write the tensor with torch.save.")
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except RequestError:
        raise
    except Exception as error:  # a hostile file can fail in any way
        raise refuse(f"is not a tensor that torch.save wrote: {_short(error)}") from error


def _from_safetensors(raw: bytes, refuse: Any) -> Any:
    try:
        tensors = load_safetensors(raw)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise refuse(
            f"is neither a torch.save file (of PyTorch 1.6 or later) nor safetensors: {_short(error)}"
        ) from error
    if len(tensors) != 1:
        raise refuse(f"must hold one tensor, got a safetensors file of {len(tensors)}.")
    return next(iter(tensors.values()))


def _short(error: Exception) -> str:
    """The first sentence of an error; PyTorch then advises against safe loading."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:200] + ("" if lines[0].endswith(".") else ".")
