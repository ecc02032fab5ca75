"""Timing of requests part by part: compress, load, lay out, prefill, decode.

The time to first token (TTFT) is measured as a whole, from the request (question and passages in hand) to the first token;
its parts are marks within the same request, so they add up to it. Jobs take turns within each repeat, so that a change of
the machine's pace affects all of them, and the median counts.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...compressors import CompressedPassage, Reader
from ...recipes.data.templates import Piece, question_prompt
from .. import metrics
from ..costs.costs import DecoderShape, Work
from ..methods import prompt_size
from ..rows import Row
from .clock import Parts, answer_parts, peak_memory, timed
from .entrants import FULL, Entrant, bare_encoder


@dataclass(frozen=True)
class Request:
    """A question and its retrieved passages."""

    question: str
    passages: tuple[str, ...]

    def prompts(self, load: Callable[[], list[Any]]) -> list[list[Any]]:
        """The prompts of the request; `load` gives its passages, as texts or compressed."""
        return [question_prompt(load(), self.question)]


@dataclass
class Taken:
    """Measurements of one entrant.

    Attributes:
        parts, compress, online: Times of each repeat in ms: of stored passages, of compressing, and the TTFT with
            compression within the request.
        slots, kv_slots, prompt: Means per prompt: slots (tokens for text), those that are keys and values, positions read.
        nbytes: Mean bytes per passage, compressed or as text.
        flops: Of one prefill, as torch counts them. `peak`: peak memory of a request.
    """

    parts: list[Parts] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    online: list[float] = field(default_factory=list)
    slots: float = 0
    kv_slots: float = 0
    prompt: float = 0
    nbytes: float = 0.0
    flops: int = 0
    peak: int | None = None
    _sizes: list[tuple[float, ...]] = field(default_factory=list)

    def median(self, part: str) -> float:
        """Median of `load`, `plan`, `prefill`, `ttft` or `decode`."""
        return statistics.median(getattr(parts, part) for parts in self.parts)

    def prefill(self, shape: DecoderShape, dtype: str, batch: int = 1) -> Work:
        """The least work of a prefill."""
        past = round(self.kv_slots)
        return shape.forward(round(self.prompt) - past, past, batch=batch, dtype=dtype)

    def add_sizes(self, reader: Reader, pieces: Sequence[Any], prompt: list[Any]) -> None:
        """Add a request with its texts or compressed passages; the sizes become means over all requests."""
        soft = [piece for piece in pieces if isinstance(piece, CompressedPassage)]
        tokens = sum(map(len, reader.tokenize_batch([piece for piece in pieces if isinstance(piece, str)])))
        nbytes = [p.nbytes if isinstance(p, CompressedPassage) else len(p.encode()) for p in pieces]
        kv_slots = sum(p.slots for p in soft if p.interface == "kv")
        slots = tokens + sum(p.slots for p in soft)
        self._sizes.append((slots, kv_slots, prompt_size(reader, prompt), statistics.mean(nbytes)))
        self.slots, self.kv_slots, self.prompt, self.nbytes = map(statistics.mean, zip(*self._sizes))


@dataclass(eq=False)
class Job:
    """What is run in each repeat; `compress` and `online` only where they are given."""

    reader: Reader
    prompts: Callable[[], list[Any]]
    taken: Taken
    compress: Callable[[], Any] | None = None
    online: Callable[[], list[Any]] | None = None


def check_repeats(repeats: int, warmup: int, decode_tokens: int) -> None:
    """Raise ValueError for numbers that nothing can be timed with."""
    if repeats < 1 or warmup < 0 or decode_tokens < 2:
        raise ValueError(
            f"Timing needs repeats >= 1, warmup >= 0 and decode_tokens >= 2, got {repeats}, {warmup} and {decode_tokens}."
        )


def run_jobs(
    jobs: Sequence[Job],
    *,
    repeats: int,
    warmup: int,
    decode_tokens: int,
    compressions: int | None = None,
    out_of_memory: Callable[[Job], None] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Time all jobs in turns.

    Args:
        repeats: Rounds that count; `warmup` rounds come before them.
        compressions: Most rounds that compression is timed in.
        out_of_memory: Called with a job that ran out of memory; those with the same `taken` are dropped. None: raise.
        advance: Called with 1 after each job.
    """
    waiting = list(jobs)
    for turn in range(warmup + repeats):
        for job in list(waiting):
            if job not in waiting:
                continue
            compresses = job.compress is not None and (compressions is None or turn < warmup + compressions)
            try:
                spent = timed(job.reader.device, job.compress) if compresses and job.compress is not None else None
                online = answer_parts(job.reader, job.online, 1).ttft if job.online is not None else None
                parts = answer_parts(job.reader, job.prompts, decode_tokens)
            except torch.OutOfMemoryError:
                if out_of_memory is None:
                    raise
                waiting = [other for other in waiting if other.taken is not job.taken]
                out_of_memory(job)
                continue
            if turn >= warmup:
                job.taken.parts.append(parts)
                job.taken.compress += [spent] if spent is not None else []
                job.taken.online += [online] if online is not None else []
            advance(1)


def time_requests(
    reader: Reader,
    entrants: Sequence[Entrant],
    requests: Sequence[Request],
    *,
    repeats: int = 5,
    warmup: int = 2,
    decode_tokens: int = 16,
    compressions: int | None = None,
    online: bool = True,
    seed: int = 0,
    left_out: Callable[[Entrant], None] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[Entrant, Taken]:
    """Time every entrant on every request; passages are compressed ahead of time and loaded from disk.

    Args:
        repeats, warmup, compressions, advance: See `run_jobs`.
        online: Also time requests that compress their passages.
        seed: Of random slots.
        left_out: Called with an entrant that the device has no memory for; None: raise.

    Raises ValueError if there is nothing to time, or a prompt does not fit into the reader.
    """
    if not entrants or not requests:
        raise ValueError("Timing needs at least one contender and one request.")
    check_repeats(repeats, warmup, decode_tokens)
    jobs: dict[Entrant, list[Job]] = {}

    def drop(entrant: Entrant) -> None:
        jobs.pop(entrant, None)
        if left_out is None:
            raise
        left_out(entrant)

    with tempfile.TemporaryDirectory(prefix="nutgraf-timing-") as folder, forgetful(entrants):
        for number, entrant in enumerate(entrants):
            taken, files = Taken(), Path(folder) / str(number)
            try:
                jobs[entrant] = [
                    _job(reader, entrant, request, taken, files / str(k), online, seed)
                    for k, request in enumerate(requests)
                ]
            except torch.OutOfMemoryError:
                drop(entrant)
        run_jobs(
            [job for each in zip(*jobs.values()) for job in each],
            repeats=repeats,
            warmup=warmup,
            decode_tokens=decode_tokens,
            compressions=compressions,
            out_of_memory=lambda job: drop(next(entrant for entrant, each in jobs.items() if job in each)),
            advance=advance,
        )
        for job, *_ in jobs.values():
            once = functools.partial(_once, job)
            job.taken.flops, job.taken.peak = count_flops(once), peak_memory(job.reader.device, once)
    return {entrant: job.taken for entrant, (job, *_) in jobs.items()}


def _job(
    reader: Reader, entrant: Entrant, request: Request, taken: Taken, folder: Path, online: bool, seed: int
) -> Job:
    own, texts = entrant.reads(reader), list(request.passages)
    make = functools.partial(entrant.make, reader, texts, seed)
    made = make()
    taken.add_sizes(own, made, request.prompts(lambda: made)[0])
    if entrant == FULL:
        return Job(own, functools.partial(request.prompts, make), taken)
    job = Job(own, functools.partial(request.prompts, functools.partial(load, save(made, folder), own)), taken, make)
    if entrant.compressor is None:
        job.compress = functools.partial(bare_encoder, reader, texts, made[0].slots, entrant.interface == "kv")
    elif online:
        job.online = functools.partial(request.prompts, make)
    return job


def _once(job: Job) -> None:
    job.reader.generate(job.prompts(), 1, min_new_tokens=1)


def save(made: Sequence[CompressedPassage], folder: Path) -> list[Path]:
    """Store compressed passages, one file each."""
    files = [folder / f"{n}.safetensors" for n in range(len(made))]
    for passage, file in zip(made, files):
        passage.save(file)
    return files


def load(files: Sequence[Path], reader: Reader) -> list[Any]:
    """The stored passages on the reader's device."""
    return [CompressedPassage.load(file).to(reader.device) for file in files]


def figures(entrant: Entrant, taken: Taken, full: Taken, batch: int, decode_tokens: int) -> Row:
    """The keys that rows of both speed suites share. Times are of the whole batch, `compress_ms` of one prompt's passages.

    `break_even_reads`: reads that pay for compressing once, compress / (full TTFT - stored TTFT); absent if none do.
    """
    ttft, decode = taken.median("ttft"), taken.median("decode")
    row: Row = {
        "context_tokens": full.slots,
        "reader_tokens": taken.prompt,
        "ratio": metrics.compression_ratio(round(full.slots), round(taken.slots)),
        "plan_ms": taken.median("plan"),
        "prefill_ms": taken.median("prefill"),
        "ttft_ms": ttft,
        "decode_ms_per_token": decode,
        "ttft_full_ms": full.median("ttft"),
        "ttft_speedup": full.median("ttft") / ttft,
        "bytes_per_passage": taken.nbytes,
        "peak_bytes": taken.peak,
        "requests_per_s": 1000 * batch / (ttft + decode * (decode_tokens - 1)),
    }
    if entrant.method != FULL.method:
        compress, saved = statistics.median(taken.compress), (full.median("ttft") - ttft) / batch
        row |= {"compress_ms": compress, "load_ms": taken.median("load")}
        row["break_even_reads"] = compress / saved if saved > 0 else None
    return row


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call, including attention on the CPU, which torch alone leaves out."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (width + value[3])

    with FlopCounterMode(display=False, custom_mapping={attention: flops}) as counter:
        run()
    return counter.get_total_flops()


@contextlib.contextmanager
def forgetful(entrants: Sequence[Entrant]) -> Iterator[None]:
    """Switch off the caches of embedders, so that every request is embedded again."""
    embedders = [getattr(entrant.compressor, "embedder", None) for entrant in entrants]
    found: dict[int, Any] = {id(e): e for e in embedders if hasattr(e, "cache_entries")}
    before = {key: embedder.cache_entries for key, embedder in found.items()}
    try:
        for embedder in found.values():
            embedder.cache_entries = 0
            embedder.embed([""])  # drops what is cached
        yield
    finally:
        for key, embedder in found.items():
            embedder.cache_entries = before[key]


def first_token_times(
    reads: Reader,
    prompts: Sequence[list[Piece]],
    reader: Reader,
    full: Sequence[list[Piece]],
    *,
    requests: int,
    repeats: int = 3,
    fresh: Callable[[int], list[Piece]] | None = None,
) -> tuple[float, float]:
    """Median milliseconds to the first token of a line's prompts and of the full text's, slots in memory.

    Args:
        reads, prompts: The line's reader and its prompts of all questions; `reader`, `full`: the full text's.
        requests: Questions to time, evenly spread, one at a time, `repeats` times each after a warm-up round.
        fresh: Makes the prompt of question i again, compressing its passages, for methods that need the question.

    Raises ValueError for no request, or lists that differ in length.
    """
    if requests < 1 or not prompts or len(prompts) != len(full):
        raise ValueError(
            f"Timing needs at least one request and as many full prompts as others, got {requests} of {len(prompts)} and "
            f"{len(full)}."
        )
    count = min(requests, len(prompts))
    ours, theirs = Taken(), Taken()
    make = prompts.__getitem__ if fresh is None else fresh
    jobs = []
    for i in (i * len(prompts) // count for i in range(count)):
        jobs += [Job(reads, lambda i=i: [make(i)], ours), Job(reader, lambda i=i: [full[i]], theirs)]  # type: ignore[misc]
    run_jobs(jobs, repeats=repeats, warmup=1, decode_tokens=1)
    return ours.median("ttft"), theirs.median("ttft")
