"""Whether compressing pays, from a reader's config, the passages' lengths, how often they are read, and the hardware.

Every time is the device's roofline (`roofline.py`) for the work that `costs.py` counts, over an efficiency, plus a fixed
overhead per request: a lower bound. What an answer loses is not part of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...compressors import COMPRESSORS
from .costs import DecoderShape, Work
from .roofline import Roofline
from .storage import DENSE, PRECISIONS, RAGGED, SOFT, TEXT, Loading, loading, stored_bytes

VECTOR = 1024  # width of a retrieval embedder's vector
BLOCKS = 3  # cross-attention blocks of IC-Former
FITTING = 200  # steps of fitting slots to a passage, each forward and back
# Tokens of kv-match's questions: per token of the passage (SQuAD and NQ, tune halves, 3.4 in both), and of 48 questions.
PROBED, PROBES = 3.4, 1200


@dataclass(frozen=True)
class Family:
    """Methods that cost the same: those of one interface and `cost` (see `CompressorConfig.cost`).

    Attributes:
        online: Made for each question, so nothing is stored.
    """

    name: str
    interface: str
    cost: str
    online: bool = False

    @property
    def methods(self) -> str:
        """Titles of the methods."""
        found = [cls.config_class for cls in COMPRESSORS.values() if cls.interface == self.interface]
        return ", ".join(config.title or config.method for config in found if config.cost == self.cost)

    @property
    def form(self) -> str:
        """What a store keeps of a passage."""
        return {"embeds": SOFT, "kv": DENSE if self.cost == "slots" else RAGGED}.get(self.interface, TEXT)


SELECTED = "selected keys and values"
FAMILIES = (
    Family("memory slots", "embeds", "slots"),
    Family("pooled states", "embeds", "states"),
    Family("keys and values", "kv", "slots"),
    Family(SELECTED, "kv", "probes"),
    Family("keys and values at places of their own", "kv", "states"),
    Family("cross-attention digests", "embeds", "blocks"),
    Family("one vector", "embeds", "vector"),
    Family("fitted slots", "embeds", "fit"),
    Family("shorter text", "text", "scores"),
    Family("text for the question", "text", "contrast", online=True),
)


@dataclass(frozen=True)
class Load:
    """What the reader is asked.

    Attributes:
        passage_tokens: Lengths of passages, equally frequent.
        passages: Per query.
        hits: How often a passage is read in its life.
        prompt_tokens: Of question and template.
        corpus: Passages in the store.
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
        efficiency: Share of the roofline that is reached, in (0, 1].
        overhead: Fixed seconds of every request.
        store: Bytes per second at which stored passages are read.
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
    """Cost of a way of reading; times in ms.

    Attributes:
        slots: Per passage; for text, its tokens.
        load_ms, ttft_ms, decode_ms, answer_ms: Of a query: from the store, to the first token, each later token, all.
        compress_ms: One passage, once; online, a query's passages every time (part of TTFT).
        bytes_per_passage, store_bytes, cache_bytes: One passage, the corpus, and keys and values of a query.
        break_even_reads: Reads of a passage that pay for compressing it; None if none do.
        saved_ms: Per passage over its life, with compressing paid.
        fits: Whether prompt and answer fit into the reader.
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
    """The full text, then every family with methods at every ratio (one vector has only one).

    Raises ValueError for no ratio, or ratios below 1.
    """
    if not ratios or any(not (math.isfinite(r) and r >= 1) for r in ratios):
        raise ValueError(f"Ratios must be numbers of at least 1, got {list(ratios)}.")
    full = _line(FULL_TEXT, 1.0, shape, load, hardware)
    lines = [full]
    for family in (family for family in FAMILIES if family.methods):
        for ratio in ratios if family.cost != "vector" else (math.inf,):
            lines.append(_line(family, ratio, shape, load, hardware, full))
    return lines


def best(lines: Sequence[Line]) -> Line:
    """The line that saves most over a passage's life among those that pay and fit, else the full text."""
    paying = [line for line in lines[1:] if line.pays and line.fits]
    return max(paying, key=lambda line: line.saved_ms, default=lines[0])


def loadings(shape: DecoderShape, load: Load, hardware: Hardware, ratios: Sequence[float], full: Line) -> list[Loading]:
    """Soft slots and both kinds of keys and values from the store at every ratio and precision; `full`: the text's line."""
    found: list[Loading] = []
    for family in (family for family in FAMILIES if family.cost in ("slots", "states", "probes") and family.methods):
        if any(row.form == family.form for row in found):  # pooled states are stored as memory slots are
            continue
        for ratio in ratios:
            line = _line(family, ratio, shape, load, hardware, full)
            found += [
                loading(
                    shape,
                    family.form,
                    precision,
                    counts=_counts(load, ratio),
                    ratio=line.ratio,
                    passages=load.passages,
                    dtype=hardware.roofline.dtype,
                    bandwidth=hardware.store,
                    prefill_ms=line.ttft_ms - line.load_ms,
                    text_ms=full.ttft_ms,
                    compress_ms=line.compress_ms,
                    hits=load.hits,
                )
                for precision in PRECISIONS
            ]
    return found


FULL_TEXT = Family("full text", "text", "none")


def _line(
    family: Family, ratio: float, shape: DecoderShape, load: Load, hardware: Hardware, full: Line | None = None
) -> Line:
    """A family at a ratio; the full text itself without `full`."""
    dtype = hardware.roofline.dtype
    counts = _counts(load, ratio)
    slots = statistics.mean(counts)
    stored = full is not None and not family.online
    held = statistics.mean(stored_bytes(shape, family.form, n, dtype) for n in counts) if stored else 0.0
    pack = load.passages  # compressed together
    each = [_encode(family, shape, n, s, pack, dtype) for n, s in zip(load.passage_tokens, counts)]
    compress = statistics.mean(map(hardware.seconds, each)) / pack
    read = round(slots * load.passages)
    run, past = (load.prompt_tokens, read) if family.interface == "kv" else (load.prompt_tokens + read, 0)
    wait = compress * load.passages if family.online else held * load.passages / hardware.store
    ttft = hardware.overhead + wait + hardware.seconds(shape.forward(run, past, dtype=dtype))
    decode = hardware.seconds(shape.forward(1, run + past + load.answer_tokens // 2, dtype=dtype))
    answer = ttft + decode * (load.answer_tokens - 1)
    saved = 0.0 if full is None else (full.answer_ms / 1000 - answer) / load.passages
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
        ttft_speedup=1.0 if full is None else full.ttft_ms / (1000 * ttft),
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


def _counts(load: Load, ratio: float) -> list[int]:
    """Slots of a passage of each length."""
    return [max(1, math.ceil(n / ratio)) for n in load.passage_tokens]


def _encode(family: Family, shape: DecoderShape, tokens: int, slots: int, batch: int, dtype: str) -> Work:
    """Work of compressing `batch` passages of one length together."""
    if family.cost == "none":
        return Work()
    if family.cost == "vector":
        weights = VECTOR * shape.width + shape.width * shape.width
        return Work(2.0 * batch * weights, 2.0 * weights)
    if family.cost == "blocks":  # keys and values of tokens; queries, output and a SwiGLU MLP of slots
        square = shape.width * shape.width
        flops = 4 * tokens * square + 20 * slots * square + 4 * slots * (tokens + slots) * shape.width
        return Work(float(BLOCKS * batch * flops), 2.0 * BLOCKS * 12 * square)
    if family.cost == "fit":  # reads at least the slots and the passage repeated; the way back takes twice as much
        return shape.forward(tokens + slots, batch=batch, logits=tokens, dtype=dtype) * (3 * FITTING)
    run = tokens + {"slots": slots, "probes": round(min(PROBED * tokens, PROBES))}.get(family.cost, 0)
    scores = family.cost in ("scores", "contrast")
    once = shape.forward(run, batch=batch, logits=tokens if scores else 0, dtype=dtype)
    return once * (2 if family.cost == "contrast" else 1)


def _fits(shape: DecoderShape, load: Load, longest: int) -> bool:
    need = longest * load.passages + load.prompt_tokens + load.answer_tokens
    return shape.max_positions is None or need <= shape.max_positions
