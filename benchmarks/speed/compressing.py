"""How fast passages are compressed, beside a bare forward pass of the encoder's layers over the same tokens and slots.

Passages are of mixed lengths, as an index holds them. `compress_ms` is `compressor.compress` as a user calls it: tokenising,
batching, the encoder, the projector, the checks. `bare_ms` is the encoder's layers, LoRA included, over as many sequences of
the same total length without padding or mask, at the fastest of several batch sizes; `plain_ms` the same without LoRA.
`bare_share` is bare / compress: the part of the encoder's own throughput that is left.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...compressors import Reader
from ...compressors.soft.xrag import XRAGCompressor
from ..rows import Row, clean, provenance
from .bare import encoded_lengths, encoder_body, rectangles, run_body
from .clock import Clock
from .entrants import Entrant
from .timing import forgetful

BUDGETS = (1024, 4096, 16384)  # positions of one bare pass; the fastest counts


def compress_rows(
    reader: Reader,
    entrants: Sequence[Entrant],
    texts: Sequence[str],
    *,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> list[Row]:
    """A row for each compressor that has an encoder; the others are left out.

    Raises:
        ValueError: if there are no texts, or repeats are fewer than 1.
    """
    if not texts or repeats < 1 or warmup < 0:
        raise ValueError(
            f"Compressing is timed over at least one text and repeat; got {len(texts)} texts, {repeats} repeats."
        )
    tokens = sum(map(len, reader.tokenize_batch(list(texts))))
    rows = []
    with forgetful(entrants):
        for entrant in entrants:
            if (found := _passes(reader, entrant, texts)) is None:
                continue
            lengths, bare, plain = found
            compress = functools.partial(entrant.compressor.compress, list(texts), ratio=entrant.ratio)  # type: ignore[union-attr]
            spent = _times([compress, *bare, *plain], reader, repeats, warmup)
            fastest, fastest_plain = min(spent[1 : 1 + len(bare)]), min(spent[1 + len(bare) :], default=None)
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
                "plain_ms": fastest_plain,
                "bare_share": fastest / spent[0],
                "tokens_per_s": 1000 * tokens / spent[0],
            }
            rows.append(clean(row | provenance(reader, seed, entrant.compressor)))
    return rows


def _times(calls: Sequence[Callable[[], Any]], reader: Reader, repeats: int, warmup: int) -> list[float]:
    """Medians in milliseconds, all calls taking turns."""
    clock = Clock(reader.device)
    taken: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for turn in range(warmup + repeats):
            for call, times in zip(calls, taken):
                spent = clock(call)[0]
                times += [spent] if turn >= warmup else []
    return [statistics.median(times) for times in taken]


def _passes(
    reader: Reader, entrant: Entrant, texts: Sequence[str]
) -> tuple[list[int], list[Callable[[], None]], list[Callable[[], None]]] | None:
    """What the encoder reads, and bare passes over as much: of its own layers, and of the reader's where it is tuned."""
    compressor: Any = entrant.compressor
    if isinstance(compressor, XRAGCompressor):
        return _embedder_passes(compressor, texts)
    body = None if compressor is None else encoder_body(compressor)
    if body is None:
        return None
    lengths = encoded_lengths(compressor, texts, entrant.ratio)
    bodies = [body] if _same_tree(body, reader) else [body, reader.model.get_decoder()]
    made: list[list[Callable[[], None]]] = [
        [functools.partial(_run, each, lengths, reader, budget) for budget in BUDGETS] for each in bodies
    ]
    return lengths, made[0], made[1] if len(made) > 1 else []


def _same_tree(body: Any, reader: Reader) -> bool:
    """Whether the encoder is no tuned form of the reader, so that the reader's own layers say nothing about it."""
    return body is reader.model.get_decoder() or type(body) is not type(reader.model.get_decoder())


def _run(body: Any, lengths: list[int], reader: Reader, budget: int) -> None:
    width = body.get_input_embeddings().weight.shape[1]
    for embeds in rectangles(lengths, width, budget, reader.model.get_input_embeddings().weight):
        run_body(body, embeds)


def _embedder_passes(
    compressor: XRAGCompressor, texts: Sequence[str]
) -> tuple[list[int], list[Callable[[], None]], list[Callable[[], None]]]:
    body: Any = compressor.embedder.model[0].auto_model
    lengths = encoded_lengths(compressor, texts)
    mean = -(-sum(lengths) // len(lengths))
    ids = torch.full((len(lengths), mean), 5, device=body.device)

    def run(budget: int) -> None:
        for part in ids.split(max(1, budget // mean)):
            body(input_ids=part)

    return lengths, [functools.partial(run, budget) for budget in BUDGETS], []
