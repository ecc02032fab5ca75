"""Does compressing pay? Worked out from a reader's config, the passages' lengths, how often they are read, and the hardware.

Every time is the device's roofline (see `roofline.py`) for the work that `costs.py` counts, over an efficiency that holds
for full text and compressed passages alike, plus an overhead that every request has. So the times are floors and their
ratios are what hardware allows; `nutgraf bench speed` measures. What an answer loses is no part of it: that is
`nutgraf bench quality`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .costs import DecoderShape, Work
from .roofline import Roofline

VECTOR = 1024  # width of a retrieval embedder's vector, as xRAG's projector reads it
CHARACTERS = 4  # of a token, about, for the bytes of a shorter text


@dataclass(frozen=True)
class Family:
    """Methods that cost the same.

    Attributes:
        name: of the family. `methods`: its members here.
        interface: what the reader reads: `embeds`, `kv` or `text`.
        encoder: what compressing runs: `slots` (the reader's layers over passage and slots), `states` (over the passage),
            `scores` (over the passage, with the head), `contrast` (the same twice, with the question and without) or `vector`
            (a projector on the retrieval index's vector).
        online: made for each question, so there is nothing to store.
    """

    name: str
    methods: str
    interface: str
    encoder: str
    online: bool = False


FAMILIES = (
    Family("memory slots", "ICAE, PISCO, AutoCompressor", "embeds", "slots"),
    Family("pooled states", "mean-pooled windows, salient windows", "embeds", "states"),
    Family("keys and values", "gist tokens, 500xCompressor", "kv", "slots"),
    Family("one vector", "xRAG", "embeds", "vector"),
    Family("shorter text", "LLMLingua, LLMLingua-2, Selective Context", "text", "scores"),
    Family("text for the question", "LongLLMLingua", "text", "contrast", online=True),
)


@dataclass(frozen=True)
class Load:
    """What the reader is asked.

    Attributes:
        passage_tokens: lengths of passages, equally frequent.
        passages: a query.
        hits: how often a passage is read in its life.
        prompt_tokens: question and template. `answer_tokens`: of an answer.
        corpus: passages in the store.
    """

    passage_tokens: tuple[int, ...]
    passages: int
    hits: float
    prompt_tokens: int = 64
    answer_tokens: int = 32
    corpus: int = 1

    def __post_init__(self) -> None:
        if not self.passage_tokens or min(self.passage_tokens) < 1:
            raise ValueError(f"Passages need lengths of at least 1 token, got {list(self.passage_tokens)}.")
        for key in ("passages", "prompt_tokens", "answer_tokens", "corpus"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key.replace('_', ' ')} must be at least 1, got {getattr(self, key)}.")
        if not (math.isfinite(self.hits) and self.hits >= 0):
            raise ValueError(f"Hits a passage must be a number of at least 0, got {self.hits}.")


@dataclass(frozen=True)
class Hardware:
    """What it runs on.

    Attributes:
        roofline: the device's rates.
        efficiency: share of the roofline that is reached, in (0, 1].
        overhead: seconds that every request takes beside it.
        store: bytes a second at which stored passages are read.
    """

    roofline: Roofline
    efficiency: float = 1.0
    overhead: float = 0.0
    store: float = 1e9

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"Efficiency must be over 0 and at most 1, got {self.efficiency}.")
        if not (math.isfinite(self.overhead) and self.overhead >= 0):
            raise ValueError(f"The overhead of a request must be at least 0 ms, got {1000 * self.overhead}.")
        if not (math.isfinite(self.store) and self.store > 0):
            raise ValueError(f"The store's GB/s must be a positive number, got {self.store / 1e9}.")

    def seconds(self, work: Work) -> float:
        """Time for some work."""
        return self.roofline.seconds(work) / self.efficiency


@dataclass(frozen=True)
class Line:
    """What a way of reading costs; times in ms.

    Attributes:
        slots: a passage, in the mean; for text, its tokens.
        load_ms, ttft_ms, decode_ms, answer_ms: of a query: from the store, to the first token, each token after it, all.
        ttft_speedup: of the full text's TTFT. compress_ms: one passage, once (or, online, a query's passages every time,
            which then is part of TTFT).
        bytes_per_passage, store_bytes: in the store, one passage and the corpus. cache_bytes: keys and values of a query.
        break_even_reads: reads of a passage that pay for compressing it; None if none do.
        saved_ms: a passage over its life, compressing paid; negative if it does not pay.
        fits: the reader has room for the prompt and its answer.
    """

    family: str
    methods: str
    interface: str
    ratio: float
    slots: float
    compress_ms: float
    load_ms: float
    ttft_ms: float
    ttft_speedup: float
    decode_ms: float
    answer_ms: float
    bytes_per_passage: float
    store_bytes: float
    cache_bytes: float
    break_even_reads: float | None
    saved_ms: float
    pays: bool
    fits: bool


def work_out(shape: DecoderShape, load: Load, hardware: Hardware, ratios: Sequence[float]) -> list[Line]:
    """The full text, then every family at every ratio (one vector has only one).

    Raises:
        ValueError: for ratios below 1 or none.
    """
    if not ratios or any(not (math.isfinite(r) and r >= 1) for r in ratios):
        raise ValueError(f"Ratios must be numbers of at least 1, got {list(ratios)}.")
    full = _full(shape, load, hardware)
    lines = [full]
    for family in FAMILIES:
        for ratio in ratios if family.encoder != "vector" else (math.inf,):
            lines.append(_line(family, ratio, shape, load, hardware, full))
    return lines


def best(lines: Sequence[Line]) -> Line:
    """What saves most over a passage's life among what pays and fits; the full text if nothing does."""
    paying = [line for line in lines[1:] if line.pays and line.fits]
    return max(paying, key=lambda line: line.saved_ms, default=lines[0])


def _full(shape: DecoderShape, load: Load, hardware: Hardware) -> Line:
    tokens = statistics.mean(load.passage_tokens)
    run = round(tokens * load.passages) + load.prompt_tokens
    ttft, decode, answer = _answer(shape, load, hardware, run, 0, 0.0)
    return Line(
        family="full text",
        methods="",
        interface="text",
        ratio=1.0,
        slots=tokens,
        compress_ms=0.0,
        load_ms=0.0,
        ttft_ms=1000 * ttft,
        ttft_speedup=1.0,
        decode_ms=1000 * decode,
        answer_ms=1000 * answer,
        bytes_per_passage=0.0,
        store_bytes=0.0,
        cache_bytes=float(shape.kv_bytes(run, hardware.roofline.dtype)),
        break_even_reads=None,
        saved_ms=0.0,
        pays=False,
        fits=_fits(shape, load, max(load.passage_tokens)),
    )


def _line(family: Family, ratio: float, shape: DecoderShape, load: Load, hardware: Hardware, full: Line) -> Line:
    dtype = hardware.roofline.dtype
    counts = [max(1, math.ceil(n / ratio)) for n in load.passage_tokens]
    slots = statistics.mean(counts)
    sizes = {"embeds": shape.embed_bytes, "kv": shape.kv_bytes, "text": lambda n, _: CHARACTERS * n}
    held = 0.0 if family.online else statistics.mean(sizes[family.interface](n, dtype) for n in counts)
    pack = load.passages  # passages are compressed in batches; so many at a time is what a query brings
    each = [_encode(family, shape, n, s, pack, dtype) for n, s in zip(load.passage_tokens, counts)]
    compress = statistics.mean(map(hardware.seconds, each)) / pack
    read = round(slots * load.passages)
    run, past = (load.prompt_tokens, read) if family.interface == "kv" else (load.prompt_tokens + read, 0)
    wait = compress * load.passages if family.online else held * load.passages / hardware.store
    ttft, decode, answer = _answer(shape, load, hardware, run, past, wait)
    saved = (full.answer_ms / 1000 - answer) / load.passages
    price = 0.0 if family.online else compress
    net = load.hits * saved - price
    return Line(
        family=family.name,
        methods=family.methods,
        interface=family.interface,
        ratio=statistics.mean(load.passage_tokens) / slots,
        slots=slots,
        compress_ms=1000 * compress * (load.passages if family.online else 1),
        load_ms=0.0 if family.online else 1000 * wait,
        ttft_ms=1000 * ttft,
        ttft_speedup=full.ttft_ms / (1000 * ttft),
        decode_ms=1000 * decode,
        answer_ms=1000 * answer,
        bytes_per_passage=held,
        store_bytes=held * load.corpus,
        cache_bytes=float(shape.kv_bytes(run + past, dtype)),
        break_even_reads=price / saved if saved > 0 else None,
        saved_ms=1000 * net,
        pays=saved > 0 and net > 0,
        fits=_fits(shape, load, max(counts)),
    )


def _encode(family: Family, shape: DecoderShape, tokens: int, slots: int, batch: int, dtype: str) -> Work:
    """Compressing so many passages of one length together."""
    if family.encoder == "vector":
        weights = VECTOR * shape.width + shape.width * shape.width
        return Work(2.0 * batch * weights, 2.0 * weights)
    run = tokens + slots if family.encoder == "slots" else tokens
    scores = family.encoder in ("scores", "contrast")
    once = shape.forward(run, batch=batch, logits=tokens if scores else 0, dtype=dtype)
    return once * (2 if family.encoder == "contrast" else 1)


def _answer(
    shape: DecoderShape, load: Load, hardware: Hardware, run: int, past: int, wait: float
) -> tuple[float, float, float]:
    """Seconds to the first token, of each token after it, and of the whole answer."""
    dtype = hardware.roofline.dtype
    ttft = hardware.overhead + wait + hardware.seconds(shape.forward(run, past, dtype=dtype))
    middle = run + past + load.answer_tokens // 2
    decode = hardware.seconds(shape.forward(1, middle, dtype=dtype))
    return ttft, decode, ttft + decode * (load.answer_tokens - 1)


def _fits(shape: DecoderShape, load: Load, longest: int) -> bool:
    need = longest * load.passages + load.prompt_tokens + load.answer_tokens
    return shape.max_positions is None or need <= shape.max_positions
