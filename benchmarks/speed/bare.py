"""Bare passes: what a model takes at least for some sequences, without padding, packing, Python or anything beside it.

Sequences of unequal length are replaced by as many of their mean length, rounded up: a rectangle without padding or mask.
The shortest of several batch sizes counts where a pass is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compressors import Compressor
from ...compressors.core.batching import watch_lengths


def encoder_body(compressor: Compressor) -> Any:
    """The layers that read passages, LoRA included and without a head; None for a method without such layers."""
    held: Any = compressor
    if (body := getattr(getattr(held, "encoder", None), "decoder", None)) is not None:
        return body
    lm = getattr(held, "lm", None)
    return lm.get_decoder() if lm is not None else None


@torch.no_grad()
def encoded_lengths(compressor: Any, texts: Sequence[str], ratio: float | None = None) -> list[int]:
    """Tokens and slots of every sequence that the encoder reads for some passages."""
    with watch_lengths() as lengths:
        compressor.encode(list(texts), None, ratio)
    return lengths


def rectangles(lengths: Sequence[int], width: int, budget: int, like: Tensor) -> Iterator[Tensor]:
    """Random embeddings ``[n, mean length, width]`` for so many sequences, in passes of at most `budget` positions."""
    if not lengths:
        return
    mean = -(-sum(lengths) // len(lengths))
    step = max(1, budget // mean)
    for first in range(0, len(lengths), step):
        n = min(step, len(lengths) - first)
        yield torch.randn(n, mean, width, device=like.device, dtype=like.dtype)


def run_body(body: Any, embeds: Tensor) -> Tensor:
    """Last hidden states ``[n, time, hidden]``."""
    return body(inputs_embeds=embeds, use_cache=False).last_hidden_state
