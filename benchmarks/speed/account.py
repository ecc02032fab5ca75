"""The account of an answer: where every millisecond and byte goes, at context lengths given by numbers.

Full text and compressed passages are read in the same run, in turns. Every prompt is the passages, one after the other,
and `PROMPT_TOKENS` tokens of question and template. Slots come from a compressor, or are random values where there is none
for the reader: what is read costs the same. Then `compress_ms` is a bare pass of the reader's own body over the passages'
tokens and slots, without a head, which is what an encoder of the reader's size takes at least; the row says so.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...compressors import CompressedPassage, Reader
from ..costs.costs import DecoderShape
from ..costs.roofline import Roofline
from ..rows import Row, clean, provenance
from .account_rows import Case, Taken, figures, key_of, names
from .clock import Clock, answer_parts, peak_memory
from .entrants import FULL, PROMPT_TOKENS, Entrant, bare_encoder, make_passages, make_tail, random_passage, slots_of
from .timing import forgetful, load


@dataclass(frozen=True)
class Measurement:
    """How an account is taken.

    Attributes:
        reader: who reads the full text and, as a rule, what is compressed.
        shape: what operations and bytes are counted from.
        roofline: the device's rates.
        repeats: rounds that count, over all entrants; `warmup` rounds come before them.
        decode_tokens: length of the answers.
        random_weights: the reader's weights are random; the rows say so.
        seed: of random slots.

    Raises:
        ValueError: for bad numbers.
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
        if self.repeats < 1 or self.warmup < 0 or self.decode_tokens < 2:
            raise ValueError(
                "The account needs repeats >= 1, warmup >= 0, decode_tokens >= 2; got "
                f"{self.repeats}, {self.warmup}, {self.decode_tokens}."
            )

    def about(self) -> Row:
        """What all rows say."""
        return {
            "suite": "speed",
            "test": "account",
            "reader_shape": self.shape.name,
            "weights": "random" if self.random_weights else None,
            "decode_tokens": self.decode_tokens,
            "n": self.repeats,
            "threads": torch.get_num_threads() if self.reader.device.type == "cpu" else None,
            "matrix_tflops": self.roofline.flops / 1e12,
            "copy_gbps": self.roofline.bandwidth / 1e9,
            "roofline_source": None if self.roofline.source == "measured" else self.roofline.source,
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
    """Measure every entrant, and the full text beside them, in every case.

    Args:
        have: rows that are there already; what they measured is not measured again. The full text always is, as ratios are
            formed inside one run.
        keep: called with the new rows of each case as soon as they are there.
        say: told what is left out and why.

    Raises:
        ValueError: if the reader has no room for any of the cases.
    """
    reader = how.reader
    cases = list(cases)
    limit = reader.max_positions
    fitting = [c for c in cases if limit is None or c.context + c.passages + PROMPT_TOKENS + how.decode_tokens <= limit]
    if not fitting:
        raise ValueError(f"{reader.name!r} has {limit} positions, too few for any of the contexts asked for.")
    for case in cases:
        if case not in fitting:
            say(f"{case.context} tokens are left out: {reader.name} has {limit} positions.")
    done = {key_of(row) for row in have}
    about = how.about()
    found: list[Row] = []
    for case in fitting:
        heads = {e: about | names(e, case) | provenance(reader, how.seed, e.compressor) for e in (FULL, *entrants)}
        wanted = [e for e in (FULL, *entrants) if key_of(clean(heads[e])) not in done]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="nutgraf-account-") as folder, forgetful(wanted):
            timed = list(dict.fromkeys([FULL, *wanted]))
            taken = _measure(how, timed, case, Path(folder), say)
        if FULL not in taken:
            say(f"{case} is left out: without the full text there is nothing to compare with.")
            continue
        rows = [
            clean(heads[e] | figures(e, taken[e], taken[FULL], case, how.shape, how.roofline, how.decode_tokens))
            for e in wanted
            if e in taken
        ]
        keep(rows)
        found += rows
    return found


# -- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    how: Measurement, entrants: Sequence[Entrant], case: Case, folder: Path, say: Callable[[str], None]
) -> dict[Entrant, Taken]:
    """Times of each entrant that the device has room for, taken in turns."""
    reader, repeats, warmup = how.reader, how.repeats, how.warmup
    texts = make_passages(reader, case.passages, case.context // case.passages)
    tail = make_tail(reader)
    taken: dict[Entrant, Taken] = {}
    asks: dict[Entrant, Callable[[], list[Any]]] = {}
    packs: dict[Entrant, Callable[[], Any]] = {}
    for number, entrant in enumerate(entrants):
        try:
            made = _compressed(reader, entrant, texts, how.seed)
            files = _save(made, folder / str(number)) if entrant is not FULL else []
            asks[entrant] = functools.partial(_prompts, entrant.reads(reader), texts, files, tail, case.batch)
            packs[entrant] = _compress_call(reader, entrant, texts, made)
            taken[entrant] = _sizes(entrant.reads(reader), made, [*made, tail])
        except torch.OutOfMemoryError:
            say(f"{entrant.method} {entrant.ratio or ''} at {case} is left out: the device has no memory for it.")
    for turn in range(warmup + repeats):
        for entrant in list(taken):
            try:
                clock, own = Clock(reader.device), entrant.reads(reader)
                parts = answer_parts(own, asks[entrant], how.decode_tokens)
                spent = clock(packs[entrant])[0] if entrant is not FULL and turn < warmup + min(repeats, 3) else None
            except torch.OutOfMemoryError:
                del taken[entrant]
                say(f"{entrant.method} {entrant.ratio or ''} at {case} is left out: the device has no memory for it.")
                continue
            if turn >= warmup:
                taken[entrant].parts.append(parts)
                taken[entrant].compress += [spent] if spent is not None else []
    for entrant, its in taken.items():
        own = entrant.reads(reader)
        its.peak = peak_memory(own.device, functools.partial(_once, own, asks[entrant]))
    return taken


def _once(reader: Reader, ask: Callable[[], list[Any]]) -> None:
    reader.generate(ask(), 1, min_new_tokens=1)


def _prompts(reader: Reader, texts: list[str], files: list[Path], tail: str, batch: int) -> list[Any]:
    """A batch of prompts, each with the same passages in another order, so that all are of one length."""
    out = []
    for k in range(batch):
        pieces: list[Any] = list(load(files, reader)) if files else list(texts)
        turn = k % len(pieces)
        out.append([*pieces[turn:], *pieces[:turn], tail])
    return out


def _compressed(reader: Reader, entrant: Entrant, texts: list[str], seed: int) -> list[Any]:
    if entrant is FULL:
        return list(texts)
    if entrant.compressor is not None:
        return list(entrant.compressor.compress(texts, ratio=entrant.ratio))
    generator = torch.Generator(device=reader.device).manual_seed(seed)
    lengths = [len(ids) for ids in reader.tokenize_batch(texts)]
    return [random_passage(reader, n, slots_of(n, entrant.ratio), entrant.interface, generator) for n in lengths]


def _save(made: Sequence[CompressedPassage], folder: Path) -> list[Path]:
    files = [folder / f"{n}.safetensors" for n in range(len(made))]
    for passage, file in zip(made, files):
        passage.save(file)
    return files


def _compress_call(reader: Reader, entrant: Entrant, texts: list[str], made: list[Any]) -> Callable[[], Any]:
    if entrant.compressor is not None:
        return functools.partial(entrant.compressor.compress, texts, ratio=entrant.ratio)
    if entrant is FULL:
        return lambda: None
    return functools.partial(bare_encoder, reader, texts, made[0].slots, entrant.interface == "kv")


def _sizes(reader: Reader, made: list[Any], prompt: list[Any]) -> Taken:
    soft = [p for p in made if isinstance(p, CompressedPassage)]
    plain = [p for p in made if isinstance(p, str)]
    slots = sum(p.slots for p in soft) + sum(map(len, reader.tokenize_batch(plain)))
    nbytes = [p.nbytes for p in soft] + [len(p.encode()) for p in plain]
    return Taken(
        slots=slots,
        kv_slots=sum(p.slots for p in soft if p.interface == "kv"),
        prompt=reader.length(prompt),
        nbytes=statistics.mean(nbytes),
    )
