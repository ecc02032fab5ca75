"""Compression throughput next to a bare forward pass of the encoder's layers over the same tokens and slots.

`compress_ms` is `compressor.compress` on passages of mixed lengths, as a user calls it. `bare_ms` is the encoder's layers,
LoRA included, over sequences of the same total length without padding or mask, at the fastest of several batch sizes;
`plain_ms` the same with the reader's layers, without LoRA. `bare_share` is bare / compress. For methods that keep the reader's
keys and values the bare pass is a prefill of the passages; what is read besides counts as their cost.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compressors import Reader, SoftCompressor
from ...compressors.core.batching import watch_lengths
from ..rows import Row, clean, provenance
from .clock import timed
from .entrants import Entrant
from .timing import forgetful

BUDGETS = (1024, 4096, 16384)  # positions per bare pass; the fastest counts


def compress_rows(
    reader: Reader,
    entrants: Sequence[Entrant],
    texts: Sequence[str],
    *,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> list[Row]:
    """A row for each compressor with an encoder. Raises ValueError without texts or repeats."""
    if not texts or repeats < 1 or warmup < 0:
        raise ValueError(
            f"Compressing is timed over at least one text and repeat; got {len(texts)} texts, {repeats} repeats."
        )
    tokens = sum(map(len, reader.tokenize_batch(list(texts))))
    rows = []
    with forgetful(entrants):
        for entrant in entrants:
            compressor: Any = entrant.compressor
            body = None if compressor is None else compressor.encoder_body()
            if body is None:
                continue
            own = reader.model.get_decoder()
            tuned = body is not own and type(body) is type(own)
            lengths = encoded_lengths(compressor, texts, entrant.ratio)
            compress = functools.partial(compressor.compress, list(texts), ratio=entrant.ratio)
            bare = [functools.partial(_run, body, lengths, budget) for budget in BUDGETS]
            plain = [functools.partial(_run, own, lengths, budget) for budget in BUDGETS if tuned]
            spent = _times([compress, *bare, *plain], reader, repeats, warmup)
            fastest = min(spent[1 : 1 + len(bare)])
            row = {
                "suite": "speed",
                "test": "compress",
                "method": entrant.method,
                "ratio_asked": entrant.ratio,
                "compressor_weights": None if entrant.trained else "random",
                "reader_shape": reader.name,
                "passages": len(texts),
                "context_tokens": tokens,
                "encoder_tokens": sum(lengths),
                "threads": torch.get_num_threads() if reader.device.type == "cpu" else None,
                "n": repeats,
                "compress_ms": spent[0],
                "bare_ms": fastest,
                "plain_ms": min(spent[1 + len(bare) :], default=None),
                "bare_share": fastest / spent[0],
                "tokens_per_s": 1000 * tokens / spent[0],
            }
            rows.append(clean(row | provenance(reader, seed, compressor)))
    return rows


def _times(calls: Sequence[Callable[[], Any]], reader: Reader, repeats: int, warmup: int) -> list[float]:
    """Medians in milliseconds, all calls in turns."""
    with torch.no_grad():
        rounds = [[timed(reader.device, call) for call in calls] for _ in range(warmup + repeats)]
    return [statistics.median(times) for times in zip(*rounds[warmup:])]


def _run(body: Any, lengths: list[int], budget: int) -> None:
    table = body.get_input_embeddings().weight
    for embeds in rectangles(lengths, table.shape[1], budget, table):
        run_body(body, embeds)


# -- bare passes: a rectangle without padding or mask, of as many sequences of the mean length


@torch.no_grad()
def encoded_lengths(compressor: Any, texts: Sequence[str], ratio: float | None = None) -> list[int]:
    """Tokens and slots of every sequence that the encoder reads for some passages; just the passages' tokens for a method
    that keeps the reader's own keys and values."""
    if not isinstance(compressor, SoftCompressor):
        reader = compressor.base_reader
        return [len(reader.bos_ids) + len(ids) for ids in reader.tokenize_batch(list(texts)) if ids]
    with watch_lengths() as lengths:
        compressor.encode(list(texts), None, ratio)
    return lengths


def rectangles(lengths: Sequence[int], width: int, budget: int, like: Tensor) -> Iterator[Tensor]:
    """Random embeddings `[n, mean length, width]` for sequences of these lengths, at most `budget` positions per pass."""
    if not lengths:
        return
    mean = -(-sum(lengths) // len(lengths))
    step = max(1, budget // mean)
    for first in range(0, len(lengths), step):
        yield torch.randn(min(step, len(lengths) - first), mean, width, device=like.device, dtype=like.dtype)


def run_body(body: Any, embeds: Tensor) -> Tensor:
    """Last hidden states `[n, time, hidden]`."""
    return body(inputs_embeds=embeds, use_cache=False).last_hidden_state
