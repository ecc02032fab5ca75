"""Bytes of a stored passage, and whether loading it beats prefilling its text.

Counted are the tensors that a store writes: slots or pairs, a pair's bias and position, scales of quantised numbers. Loading
takes their bytes over the storage's bandwidth; unpacking and a request's latency are not part of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .costs import DecoderShape, item_bytes

SOFT, DENSE, RAGGED, TEXT = "soft slots", "keys and values, dense", "keys and values, ragged", "text"
PRECISIONS = ("as made", "int8", "int4")
GROUP = 64  # numbers that share a float16 scale
CHARACTERS = 4  # of a token of text, about


def vector_bytes(width: int, dtype: str, precision: str = "as made") -> int:
    """Bytes of one vector. Raises ValueError for an unknown dtype or precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"Slots are stored {', '.join(PRECISIONS)}; got {precision!r}.")
    if precision == "as made":
        return width * item_bytes(dtype)
    group = min(GROUP, width)
    return -(-width // group) * ((group if precision == "int8" else -(-group // 2)) + 2)


def stored_bytes(shape: DecoderShape, form: str, slots: int, dtype: str, precision: str = "as made") -> int:
    """Bytes of a passage of `slots` tokens, soft slots, positions, or pairs per head. Raises ValueError for another form."""
    if form == TEXT:
        return CHARACTERS * slots
    if form == SOFT:
        return slots * vector_bytes(shape.width, dtype, precision)
    heads = shape.layers * shape.kv_heads
    pair = 2 * vector_bytes(shape.head_dim, dtype, precision)
    if form == DENSE:
        return slots * (heads * pair + 8)  # with its position, of 64 bits
    if form == RAGGED:
        return slots * heads * (pair + item_bytes(dtype) + 4) + 4 * heads  # bias, position; count per head
    raise ValueError(f"A stored passage is {SOFT}, {DENSE}, {RAGGED} or {TEXT}; got {form!r}.")


@dataclass(frozen=True)
class Loading:
    """A query's passages read from the store in one form; times in ms.

    Attributes:
        slots, bytes_per_passage: Of one passage, on average.
        load_ms: Reading them from storage.
        prefill_ms: The reader's pass over them and the question.
        text_ms: The same for the text, which needs no loading worth counting.
        least_gbps: Bandwidth of the storage below which loading loses to prefilling the text; None if it always loses.
        wins: Whether it is faster than prefilling at the bandwidth given.
        saved_ms: Per query, with the compression divided over the passage's reads; None if it is never read.
    """

    form: str
    precision: str
    ratio: float
    slots: float
    bytes_per_passage: float
    load_ms: float
    prefill_ms: float
    text_ms: float
    least_gbps: float | None
    wins: bool
    saved_ms: float | None


def loading(
    shape: DecoderShape,
    form: str,
    precision: str,
    *,
    counts: Sequence[int],
    ratio: float,
    passages: int,
    dtype: str,
    bandwidth: float,
    prefill_ms: float,
    text_ms: float,
    compress_ms: float = 0.0,
    hits: float = 1.0,
) -> Loading:
    """The row of one form.

    Args:
        counts: Slots of passages of each length, equally frequent.
        bandwidth: Of the storage, in bytes per second.
        compress_ms: Of one passage, once; `hits`: how often it is read.
    """
    size = statistics.mean(stored_bytes(shape, form, n, dtype, precision) for n in counts)
    load_ms, gained = 1000 * passages * size / bandwidth, text_ms - prefill_ms
    return Loading(
        form=form,
        precision=precision,
        ratio=ratio,
        slots=statistics.mean(counts),
        bytes_per_passage=size,
        load_ms=load_ms,
        prefill_ms=prefill_ms,
        text_ms=text_ms,
        least_gbps=passages * size / gained / 1e6 if gained > 0 else None,
        wins=load_ms < gained,
        saved_ms=gained - load_ms - passages * compress_ms / hits if hits else None,
    )


def loading_sentence(row: Loading, gbps: float) -> str:
    """Whether loading this form wins, and from which bandwidth on."""
    stored = f"{row.form.capitalize()} at {row.ratio:.3g}x ({_bytes(row.bytes_per_passage)} a passage)"
    took = f"{stored} take {_ms(row.load_ms)} to load at {gbps:g} GB/s and {_ms(row.prefill_ms)} to read"
    start = f"{took}; prefilling the text takes {_ms(row.text_ms)}"
    if row.least_gbps is None:
        return f"{start}: loading loses at any bandwidth."
    if row.wins:
        return f"{start}: loading wins, and loses below {row.least_gbps:.2g} GB/s."
    return f"{start}: loading loses, and wins above {row.least_gbps:.2g} GB/s."


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _bytes(value: float) -> str:
    return (
        f"{value / 1e6:,.3g} MB" if value >= 1e6 else f"{value / 1e3:,.3g} kB" if value >= 1e3 else f"{value:.0f} bytes"
    )
