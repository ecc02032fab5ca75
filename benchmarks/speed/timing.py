"""Timing one request, part by part: compress, load, lay out, prefill, decode.

The time to the first token (TTFT) is measured as a whole, from the request (question and passages in hand) to the first
token out, and its parts are marks on the way of the same request, so that they add up to it. The device is waited for at
every mark. Methods take turns within each repeat, so that a change of the machine's pace meets all of them, and what is
reported is the median.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...compressors import CompressedPassage, Compressor, Reader
from ...recipes.data.templates import question_prompt
from .clock import Clock, answer_parts, peak_memory


@dataclass(frozen=True)
class Request:
    """What arrives: a question and its retrieved passages."""

    question: str
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """What is timed: the full text (no compressor) or a compressor at a ratio."""

    name: str
    compressor: Compressor | None = None
    ratio: float | None = None

    def reads(self, reader: Reader) -> Reader:
        """Who reads: `reader`, or the one that was tuned together with the compressor."""
        return reader if self.compressor is None else self.compressor.reader


@dataclass
class Cost:
    """What requests cost a contender, in milliseconds: medians over requests and repeats; 0 where there is no such part.

    Attributes:
        compress: all passages of a request, together.
        load: their compressed forms from one safetensors file each (in the page cache).
        plan: laying the prompt out: tokenising text and splicing slots.
        prefill: running the model over the prompt, to the first token.
        ttft: the stored request, measured as one: load, plan, prefill.
        ttft_online: the same with compression in place of loading.
        decode: each token after the first.
        context_tokens: reader tokens of the passages as text. `reader_tokens`: positions of the prompt that was read.
        bytes_per_passage: tensors (or text) of one compressed passage.
        kv_slots: those of `slots` that are keys and values, which are not run.
        flops: floating-point operations of one prefill, as `torch` counts them.
        peak_bytes: most memory in use during a request (see `peak_memory`).
    """

    compress: float = 0.0
    load: float = 0.0
    plan: float = 0.0
    prefill: float = 0.0
    ttft: float = 0.0
    ttft_online: float = 0.0
    decode: float = 0.0
    context_tokens: float = 0.0
    reader_tokens: float = 0.0
    slots: float = 0.0
    kv_slots: float = 0.0
    bytes_per_passage: float = 0.0
    flops: float = 0.0
    peak_bytes: int | None = None


@dataclass
class _Samples:
    """Every timing taken for a contender, by part."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, part: str, milliseconds: float) -> None:
        self.parts.setdefault(part, []).append(milliseconds)

    def median(self, part: str) -> float:
        return statistics.median(self.parts.get(part, [0.0]))


def time_contenders(
    reader: Reader,
    contenders: Sequence[Contender],
    requests: Sequence[Request],
    *,
    repeats: int = 5,
    warmup: int = 2,
    decode_tokens: int = 16,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Cost]:
    """Time every contender on every request.

    Args:
        repeats: rounds that count, each over all requests and contenders; `warmup` rounds come before them.
        decode_tokens: tokens decoded to time one.
        advance: called with 1 after each timed request.

    Raises:
        ValueError: if there is nothing to time, or a prompt has no room in the reader.
    """
    if not contenders or not requests:
        raise ValueError("Timing needs at least one contender and one request.")
    if repeats < 1 or warmup < 0 or decode_tokens < 2:
        raise ValueError(
            f"Timing needs repeats >= 1, warmup >= 0 and decode_tokens >= 2, got {repeats}, {warmup} and {decode_tokens}."
        )
    samples = [_Samples() for _ in contenders]
    with tempfile.TemporaryDirectory(prefix="nutgraf-timing-") as folder, forgetful(contenders):
        stored = [
            [store(contender, request, Path(folder) / f"{i}-{k}") for k, request in enumerate(requests)]
            for i, contender in enumerate(contenders)
        ]
        for turn in range(warmup + repeats):
            for k, request in enumerate(requests):
                for i, contender in enumerate(contenders):
                    taken = samples[i] if turn >= warmup else _Samples()
                    _time_request(reader, contender, request, stored[i][k], decode_tokens, taken)
                    advance(1)
        return [
            _cost(reader, contender, requests, files, taken)
            for contender, files, taken in zip(contenders, stored, samples)
        ]


def store(contender: Contender, request: Request, folder: Path) -> list[Path]:
    """Compress a request's passages ahead of time, one file each; nothing for the full text."""
    if contender.compressor is None:
        return []
    made = contender.compressor.compress(list(request.passages), ratio=contender.ratio)
    files = [folder / f"{n}.safetensors" for n in range(len(made))]
    for passage, file in zip(made, files):
        passage.save(file)
    return files


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call, those of attention on the CPU included, which `torch` alone leaves out."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[2] * (width + value[3])

    with FlopCounterMode(display=False, custom_mapping={attention: flops}) as counter:
        run()
    return counter.get_total_flops()


def _time_request(
    reader: Reader, contender: Contender, request: Request, files: Sequence[Path], decode_tokens: int, taken: _Samples
) -> None:
    clock = Clock(reader.device)
    compressor = contender.compressor
    reader = contender.reads(reader)
    texts = list(request.passages)

    def compressed() -> list[Any]:
        return texts if compressor is None else list(compressor.compress(texts, ratio=contender.ratio))

    def loaded() -> list[Any]:
        return texts if compressor is None else load(files, reader)

    def prompt(pieces: list[Any]) -> list[Any]:
        return question_prompt(pieces, request.question)

    if compressor is not None:
        taken.add("compress", clock(compressed)[0])
        taken.add("ttft_online", answer_parts(reader, lambda: [prompt(compressed())], 1).ttft)
    parts = answer_parts(reader, lambda: [prompt(loaded())], decode_tokens)
    for name in ("load", "plan", "prefill", "ttft", "decode"):
        taken.add(name, getattr(parts, name))


def load(files: Sequence[Path], reader: Reader) -> list[CompressedPassage]:
    """Stored compressed passages, put where the reader reads."""
    return [CompressedPassage.load(file).to(reader.device) for file in files]


def _cost(
    reader: Reader,
    contender: Contender,
    requests: Sequence[Request],
    stored: Sequence[Sequence[Path]],
    taken: _Samples,
) -> Cost:
    request, files = requests[0], stored[0]
    reader = contender.reads(reader)
    pieces = load(files, reader) if files else list(request.passages)
    prompt = question_prompt(pieces, request.question)
    lengths, slots, kv_slots, sizes = [], [], [], []
    for each, its_files in zip(requests, stored):
        its_pieces = load(its_files, reader) if its_files else list(each.passages)
        lengths.append(reader.length(question_prompt(its_pieces, each.question)))
        kv_slots.append(sum(p.slots for p in its_pieces if isinstance(p, CompressedPassage) and p.interface == "kv"))
        sizes += [p.nbytes if isinstance(p, CompressedPassage) else len(p.encode()) for p in its_pieces]
        slots.append(sum(p.slots if isinstance(p, CompressedPassage) else len(reader.tokenize(p)) for p in its_pieces))
    cost = Cost(
        compress=taken.median("compress"),
        load=taken.median("load"),
        plan=taken.median("plan"),
        prefill=taken.median("prefill"),
        ttft=taken.median("ttft"),
        decode=taken.median("decode"),
        ttft_online=taken.median("ttft_online") or taken.median("ttft"),
        context_tokens=statistics.mean(sum(map(len, reader.tokenize_batch(list(r.passages)))) for r in requests),
        reader_tokens=statistics.mean(lengths),
        slots=statistics.mean(slots),
        kv_slots=statistics.mean(kv_slots),
        bytes_per_passage=statistics.mean(sizes),
        flops=count_flops(lambda: reader.generate([prompt], 1)),
    )
    cost.peak_bytes = peak_memory(reader.device, lambda: reader.generate([prompt], 1))
    return cost


@contextlib.contextmanager
def forgetful(contenders: Sequence[Any]) -> Iterator[None]:
    """Embedders keep the vectors of texts they have seen; here every request is to be embedded anew."""
    embedders = [getattr(contender.compressor, "embedder", None) for contender in contenders]
    found: dict[int, Any] = {id(e): e for e in embedders if hasattr(e, "cache_entries")}
    before = {key: embedder.cache_entries for key, embedder in found.items()}
    try:
        for embedder in found.values():
            embedder.cache_entries = 0
            embedder.embed([""])  # lets what is kept go
        yield
    finally:
        for key, embedder in found.items():
            embedder.cache_entries = before[key]
