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
from ..methods import prompt_size
from ..rows import Row
from .clock import Parts, answer_parts, peak_memory, timed
from .entrants import FULL, Entrant


@dataclass(frozen=True)
class Request:
    """A question and its retrieved passages."""

    question: str
    passages: tuple[str, ...]


@dataclass
class Taken:
    """Measurements of one entrant.

    Attributes:
        parts, compress, online: Times of each repeat in ms: of stored passages, of compressing, and the TTFT with
            compression within the request.
        slots, kv_slots, prompt: Per prompt: slots (tokens for text), those that are keys and values, positions read.
        nbytes: Bytes per passage, compressed or as text.
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

    def median(self, part: str) -> float:
        """Median of `load`, `plan`, `prefill`, `ttft` or `decode`."""
        return statistics.median(getattr(parts, part) for parts in self.parts)

    def measure(self, reader: Reader, pieces: Sequence[Sequence[Any]], prompts: Sequence[list[Any]]) -> None:
        """Set the sizes to the means over prompts and their pieces (texts and compressed passages)."""
        soft = [[p for p in own if isinstance(p, CompressedPassage)] for own in pieces]
        plain = [[p for p in own if isinstance(p, str)] for own in pieces]
        tokens = [sum(map(len, reader.tokenize_batch(own))) for own in plain]
        self.slots = statistics.mean(n + sum(p.slots for p in own) for n, own in zip(tokens, soft))
        self.kv_slots = statistics.mean(sum(p.slots for p in own if p.interface == "kv") for own in soft)
        self.prompt = statistics.mean(prompt_size(reader, prompt) for prompt in prompts)
        self.nbytes = statistics.mean(
            p.nbytes if isinstance(p, CompressedPassage) else len(p.encode()) for own in pieces for p in own
        )


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
        out_of_memory: Called with a job that ran out of memory, which is then dropped; None: raise.
        advance: Called with 1 after each job.
    """
    waiting = list(jobs)
    for turn in range(warmup + repeats):
        for job in list(waiting):
            compresses = job.compress is not None and (compressions is None or turn < warmup + compressions)
            try:
                spent = timed(job.reader.device, job.compress) if compresses and job.compress is not None else None
                online = answer_parts(job.reader, job.online, 1).ttft if job.online is not None else None
                parts = answer_parts(job.reader, job.prompts, decode_tokens)
            except torch.OutOfMemoryError:
                if out_of_memory is None:
                    raise
                waiting.remove(job)
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
    advance: Callable[[int], None] = lambda n: None,
) -> list[Taken]:
    """Time every entrant on every request; passages are compressed ahead of time and loaded from disk.

    Raises ValueError if there is nothing to time, or a prompt does not fit into the reader.
    """
    if not entrants or not requests:
        raise ValueError("Timing needs at least one contender and one request.")
    check_repeats(repeats, warmup, decode_tokens)
    found = [Taken() for _ in entrants]
    with tempfile.TemporaryDirectory(prefix="nutgraf-timing-") as folder, forgetful(entrants):
        jobs: list[list[Job]] = []
        for k, request in enumerate(requests):
            jobs.append([])
            for i, (entrant, taken) in enumerate(zip(entrants, found)):
                texts = list(request.passages)
                make = functools.partial(_compress, entrant, texts)
                files = None if entrant.compressor is None else save(make(), Path(folder) / f"{i}-{k}")
                stored = functools.partial(
                    _prompts, request, functools.partial(load, files, entrant.reads(reader), texts)
                )
                online = None if files is None else functools.partial(_prompts, request, make)
                jobs[-1].append(Job(entrant.reads(reader), stored, taken, None if files is None else make, online))
        run_jobs(
            [j for row in jobs for j in row],
            repeats=repeats,
            warmup=warmup,
            decode_tokens=decode_tokens,
            advance=advance,
        )
        for i, taken in enumerate(found):
            own = [row[i] for row in jobs]
            prompts = [job.prompts()[0] for job in own]
            once = functools.partial(own[0].reader.generate, prompts[:1], 1)
            taken.measure(own[0].reader, [_pieces(prompt, r) for prompt, r in zip(prompts, requests)], prompts)
            taken.flops, taken.peak = count_flops(once), peak_memory(reader.device, once)
    return found


def _compress(entrant: Entrant, texts: list[str]) -> list[Any]:
    return list(entrant.compressor.compress(texts, ratio=entrant.ratio))  # type: ignore[union-attr]


def _prompts(request: Request, pieces: Callable[[], list[Any]]) -> list[Any]:
    return [question_prompt(pieces(), request.question)]


def _pieces(prompt: Sequence[Any], request: Request) -> list[Any]:
    soft = [piece for piece in prompt if isinstance(piece, CompressedPassage)]
    return soft or list(request.passages)


def save(made: Sequence[CompressedPassage], folder: Path) -> list[Path]:
    """Store compressed passages, one file each."""
    files = [folder / f"{n}.safetensors" for n in range(len(made))]
    for passage, file in zip(made, files):
        passage.save(file)
    return files


def load(files: Sequence[Path] | None, reader: Reader, texts: list[str]) -> list[Any]:
    """The stored passages on the reader's device; the texts themselves without files."""
    return list(texts) if files is None else [CompressedPassage.load(file).to(reader.device) for file in files]


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
    """Median milliseconds of a line's prompts and of the full text's, one request at a time, after a warm-up round.

    Laying out and prefill count; slots are in memory.

    Args:
        reads, prompts: The line's reader and its prompts of all questions.
        reader, full: The full text's.
        requests: Questions to time, evenly spread, `repeats` times each.
        fresh: Makes the prompt of question i again, compressing its passages, for methods that need the question.

    Raises:
        ValueError: For no request, or lists that differ in length.
    """
    if requests < 1 or not prompts or len(prompts) != len(full):
        raise ValueError(
            f"Timing needs at least one request and as many full prompts as others, got {requests} of {len(prompts)} and "
            f"{len(full)}."
        )
    count = min(requests, len(prompts))
    ours, theirs = Taken(), Taken()
    jobs = []
    for i in (i * len(prompts) // count for i in range(count)):
        jobs.append(Job(reads, functools.partial(_prompt, prompts, i, fresh), ours))
        jobs.append(Job(reader, functools.partial(_prompt, full, i), theirs))
    run_jobs(jobs, repeats=repeats, warmup=1, decode_tokens=1)
    return ours.median("ttft"), theirs.median("ttft")


def _prompt(prompts: Sequence[list[Piece]], i: int, fresh: Callable[[int], list[Piece]] | None = None) -> list[Any]:
    return [prompts[i] if fresh is None else fresh(i)]
