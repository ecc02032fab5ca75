"""The rows of the account: what a case is, what is measured in it, and the figures that follow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from .. import metrics
from ..costs.costs import DecoderShape, Work
from ..costs.roofline import Roofline
from ..rows import Row
from .clock import Parts
from .entrants import FULL, RANDOM, Entrant

KEY = (
    "test", "reader_shape", "reader", "device", "dtype", "context_asked", "passages", "batch", "method", "interface",
    "ratio_asked", "decode_tokens", "threads",
)  # fmt: skip


@dataclass
class Taken:
    """What was measured for an entrant: each repeat's parts and compression times, in ms, and what does not vary."""

    parts: list[Parts] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    slots: int = 0
    kv_slots: int = 0
    prompt: int = 0
    nbytes: float = 0.0
    peak: int | None = None

    def median(self, part: str) -> float:
        return statistics.median(getattr(parts, part) for parts in self.parts)


@dataclass(frozen=True)
class Case:
    """What a group of rows is about: passages that are `context` tokens together, in prompts read `batch` at a time."""

    context: int
    passages: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.passages < 1 or self.batch < 1 or self.context < self.passages:
            raise ValueError(
                f"A case needs at least one passage, one prompt and a token for each passage; got {self.context} tokens in "
                f"{self.passages} passages, {self.batch} at a time."
            )


def names(entrant: Entrant, case: Case) -> Row:
    """What a row is about."""
    return {
        "method": entrant.method,
        "ratio_asked": entrant.ratio,
        "interface": entrant.interface,
        "context_asked": case.context,
        "passages": case.passages,
        "batch": case.batch,
        "slots_are": "random values" if entrant.method == RANDOM else None,
        "compressor_weights": None if entrant.trained else "random",
    }


def key_of(row: Row) -> tuple[Any, ...]:
    """What two rows have in common that measured the same."""
    return tuple(row.get(name) for name in KEY)


def figures(
    entrant: Entrant, taken: Taken, full: Taken, case: Case, shape: DecoderShape, roofline: Roofline, answer: int
) -> Row:
    """The figures of a row: times of the whole batch in ms, compression of one prompt's passages."""
    dtype, batch = roofline.dtype, case.batch
    run = taken.prompt - taken.kv_slots
    prefill = shape.forward(run, taken.kv_slots, batch=batch, dtype=dtype)
    steps = [shape.forward(1, taken.prompt + t, batch=batch, dtype=dtype) for t in range(answer - 1)]
    step = sum(steps, Work()) * (1 / len(steps))
    ttft, decode = taken.median("ttft"), taken.median("decode")
    floor, decode_floor = 1000 * roofline.seconds(prefill), 1000 * roofline.seconds(step)
    whole = (ttft + decode * (answer - 1)) / 1000
    row: Row = {
        "context_tokens": full.slots,
        "reader_tokens": taken.prompt,
        "prompt_tokens": taken.prompt - taken.slots,
        "slots": None if entrant is FULL else taken.slots,
        "ratio": metrics.compression_ratio(full.slots, taken.slots),
        "plan_ms": taken.median("plan"),
        "prefill_ms": taken.median("prefill"),
        "ttft_ms": ttft,
        "decode_ms_per_token": decode,
        "ttft_full_ms": full.median("ttft"),
        "ttft_speedup": full.median("ttft") / ttft,
        "roofline_ms": floor,
        "roofline_share": floor / ttft,
        "decode_roofline_ms": decode_floor,
        "decode_roofline_share": decode_floor / decode,
        "flops": prefill.flops,
        "decode_flops": step.flops,
        "bytes_per_passage": taken.nbytes,
        "peak_bytes": taken.peak,
        "requests_per_s": batch / whole,
        "answer_tokens_per_s": batch * answer / whole,
        "context_tokens_per_s": 1000 * batch * full.slots / ttft,
    }
    if entrant is FULL:
        return row
    compress = statistics.median(taken.compress)
    saved = (full.median("ttft") - ttft) / batch
    bare = shape.forward(
        -(-(full.slots + (taken.slots if entrant.interface != "text" else 0)) // case.passages),
        batch=case.passages,
        logits=0,
        dtype=dtype,
    )
    row |= {
        "compress_ms": compress,
        "load_ms": taken.median("load"),
        "break_even_reads": compress / saved if saved > 0 else None,
    }
    if entrant.compressor is None:
        row |= {
            "compress_is": "bare encoder forward",
            "compress_flops": bare.flops,
            "compress_roofline_ms": 1000 * roofline.seconds(bare),
        }
    return row
