"""The account of an answer: where every millisecond and byte goes, at context lengths given by numbers.

Every prompt is the passages, one after the other, and `PROMPT_TOKENS` tokens of question and template. Slots come from a
compressor, or are random values: reading them costs the same. `compress_ms` of random slots is one bare pass of the
reader's body over passages and slots, the least that an encoder of the reader's size takes (`compress_is` says so).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compressors import Reader
from ..costs.costs import DecoderShape, Work
from ..costs.roofline import Roofline
from ..rows import Row, clean, key_of, provenance
from .entrants import FULL, PROMPT_TOKENS, RANDOM, Entrant, make_passages, make_tail
from .timing import Request, Taken, check_repeats, figures, time_requests

KEY = (
    "test", "reader_shape", "reader", "device", "dtype", "context_asked", "passages", "batch", "method", "interface",
    "ratio_asked", "decode_tokens", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Passages of `context` tokens together, in prompts read `batch` at a time."""

    context: int
    passages: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.passages < 1 or self.batch < 1 or self.context < self.passages:
            raise ValueError(
                f"A case needs at least one passage, one prompt and a token for each passage; got {self.context} tokens in "
                f"{self.passages} passages, {self.batch} at a time."
            )


@dataclass(frozen=True)
class Measurement:
    """How an account is taken.

    Attributes:
        reader: Reads the full text and whatever is not compressed for a tuned reader.
        shape: What operations and bytes are counted from.
        roofline: The device's rates.
        repeats: Rounds that count; `warmup` rounds come before them.
        decode_tokens: Length of the answers.
        random_weights: Whether the reader's weights are random; rows say so.
        seed: Seed of random slots.
    """

    reader: Reader
    shape: DecoderShape
    roofline: Roofline
    repeats: int = 5
    warmup: int = 1
    decode_tokens: int = 16
    random_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_repeats(self.repeats, self.warmup, self.decode_tokens)

    def about(self, entrant: Entrant, case: Case) -> Row:
        """What a row is about, without figures."""
        return {
            "suite": "speed",
            "test": "account",
            "reader_shape": self.shape.name,
            "weights": "random" if self.random_weights else None,
            "decode_tokens": self.decode_tokens,
            "n": self.repeats,
            "threads": torch.get_num_threads() if self.reader.device.type == "cpu" else None,
            "load_average": round(os.getloadavg()[0], 2) if self.reader.device.type == "cpu" else None,
            "matrix_tflops": self.roofline.flops / 1e12,
            "copy_gbps": self.roofline.bandwidth / 1e9,
            "roofline_source": None if self.roofline.source == "measured" else self.roofline.source,
            "method": entrant.method,
            "ratio_asked": entrant.ratio,
            "interface": entrant.interface,
            "context_asked": case.context,
            "passages": case.passages,
            "batch": case.batch,
            "slots_are": "random values" if entrant.method == RANDOM else None,
            "compressor_weights": None if entrant.trained else "random",
            **provenance(self.reader, self.seed, entrant.compressor),
        }


def account(
    how: Measurement,
    entrants: Sequence[Entrant],
    cases: Iterable[Case],
    *,
    have: Iterable[Row] = (),
    keep: Callable[[list[Row]], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure every entrant, and the full text with them, in every case.

    Args:
        have: Rows that exist; what they measured is not measured again. The full text always is, as ratios are formed
            within one run.
        keep: Called with the new rows of each case.
        say: Told what is left out and why.

    Raises:
        ValueError: If no case fits into the reader.
    """
    reader, limit = how.reader, how.reader.max_positions
    done = {key_of(row, KEY) for row in have}
    found: list[Row] = []
    fitted = False
    for case in cases:
        if limit is not None and case.context + case.passages + PROMPT_TOKENS + how.decode_tokens > limit:
            say(f"{case.context} tokens are left out: {reader.name} has {limit} positions.")
            continue
        fitted = True
        heads = {entrant: how.about(entrant, case) for entrant in (FULL, *entrants)}
        wanted = [entrant for entrant, head in heads.items() if key_of(clean(head), KEY) not in done]
        if not wanted:
            continue
        passages = make_passages(reader, case.passages, case.context // case.passages)
        taken = time_requests(
            reader,
            list(dict.fromkeys([FULL, *wanted])),
            [Batch(make_tail(reader), tuple(passages), case.batch)],
            repeats=how.repeats,
            warmup=how.warmup,
            decode_tokens=how.decode_tokens,
            compressions=min(how.repeats, 3),
            online=False,
            seed=how.seed,
            left_out=lambda e: say(f"{e.method} {e.ratio or ''} is left out: the device has no memory for it."),
        )
        if FULL not in taken:
            say(f"{case} is left out: without the full text there is nothing to compare with.")
            continue
        rows = [clean(heads[e] | _figures(how, e, taken[e], taken[FULL], case)) for e in wanted if e in taken]
        keep(rows)
        found += rows
    if not fitted:
        raise ValueError(f"{reader.name!r} has {limit} positions, too few for any of the contexts asked for.")
    return found


@dataclass(frozen=True)
class Batch(Request):
    """`size` prompts of one length: the same passages, rotated, and then the question."""

    size: int = 1

    def prompts(self, load: Callable[[], list[Any]]) -> list[list[Any]]:
        loaded = [load() for _ in range(self.size)]
        return [[*own[k % len(own) :], *own[: k % len(own)], self.question] for k, own in enumerate(loaded)]


def _figures(how: Measurement, entrant: Entrant, taken: Taken, full: Taken, case: Case) -> Row:
    """The figures of a row, with the least work of prefill, decoding and compression."""
    shape, roofline, dtype, answer = how.shape, how.roofline, how.roofline.dtype, how.decode_tokens
    prefill = taken.prefill(shape, dtype, case.batch)
    steps = [shape.forward(1, int(taken.prompt) + t, batch=case.batch, dtype=dtype) for t in range(answer - 1)]
    step = sum(steps, Work()) * (1 / len(steps))
    floor, decode_floor = 1000 * roofline.seconds(prefill), 1000 * roofline.seconds(step)
    row = figures(entrant, taken, full, case.batch, answer)
    row |= {
        "prompt_tokens": taken.prompt - taken.slots,
        "slots": None if entrant is FULL else taken.slots,
        "roofline_ms": floor,
        "roofline_share": floor / row["ttft_ms"],
        "decode_roofline_ms": decode_floor,
        "decode_roofline_share": decode_floor / row["decode_ms_per_token"],
        "flops": prefill.flops,
        "decode_flops": step.flops,
        "answer_tokens_per_s": answer * row["requests_per_s"],
        "context_tokens_per_s": 1000 * case.batch * full.slots / row["ttft_ms"],
    }
    if entrant.method == RANDOM:
        run = -(-int(full.slots + taken.slots) // case.passages)
        bare = shape.forward(run, batch=case.passages, logits=0, dtype=dtype)
        row |= {"compress_is": "bare encoder forward", "compress_flops": bare.flops}
        row["compress_roofline_ms"] = 1000 * roofline.seconds(bare)
    return row
