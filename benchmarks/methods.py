"""The lines of a benchmark: each turns records into the contexts that the reader reads.

A method's `contexts` gives, for each record, the pieces (texts or compressed passages) that stand in front of the
question. The fixed lines are `FullText` and `NoContext`; `Compressed` is what is measured, and `Stored` the same after a
store has rounded its slots; `Shuffled` is its control; `EqualBudget` holds the text baselines that may use as many reader
positions as the compressed prompt does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..adapters.store import Encoding
from ..adapters.store.codec import round_trip
from ..compressors import CompressedPassage, Compressor, Reader
from ..recipes.data.corpus import Record
from ..recipes.data.templates import Piece, question_prompt
from .baselines import BASELINES
from .loading import CompressorSpec, find_compressor


class Method(Protocol):
    """A line of the table. `ratio` is the compression ratio asked for, None where none is."""

    name: str
    ratio: float | None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        """For each record, the pieces that stand in front of its question, in reading order."""
        ...


@dataclass(eq=False)
class FullText:
    """The fixed upper line: every passage as it is."""

    name: str = "full"
    ratio: float | None = None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [list(record.passages) for record in records]


@dataclass(eq=False)
class NoContext:
    """The fixed lower line: the question alone."""

    name: str = "none"
    ratio: float | None = None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [[] for _ in records]


@dataclass(eq=False)
class Compressed:
    """Every passage compressed on its own. Passages that records share are compressed once, unless the query matters.

    Attributes:
        compressor: what compresses.
        ratio: compression ratio to ask for; None leaves it to the compressor.
        query_aware: hand the question to the compressor, then every (passage, question) pair is compressed.
        options: further options of `Compressor.compress`, e.g. `{"batch_size": 32}`.
        together: the same compressor at all its ratios, which then may read every passage once for all of them.
    """

    compressor: Compressor
    ratio: float | None = None
    name: str = ""
    query_aware: bool = False
    options: dict[str, object] = field(default_factory=dict)
    together: list[Compressed] = field(default_factory=list, repr=False)
    _made: dict[tuple[str, str | None], CompressedPassage] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.name = self.name or self.compressor.config.method + ("-query" if self.query_aware else "")

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        wanted = [[(text, self._query(record)) for text in record.passages] for record in records]
        new = list(dict.fromkeys(key for keys in wanted for key in keys if key not in self._made))
        if new:
            texts, queries = [text for text, _ in new], [query for _, query in new]
            options = {"batch_size": 32} | self.options
            asked = queries if self.query_aware else None
            group = self.together or [self]
            made = self.compressor.compress_at(texts, [one.ratio for one in group], asked, **options)  # type: ignore[arg-type]
            for one, passages in zip(group, made):
                one._made.update(zip(new, passages))
        return [[self._made[key] for key in keys] for keys in wanted]

    def fresh(self, record: Record) -> list[Piece]:
        """A record's passages compressed anew, whatever was compressed before."""
        return list(self.compressor.compress(list(record.passages), self._query(record), self.ratio, **self.options))  # type: ignore[arg-type]

    def _query(self, record: Record) -> str | None:
        return record.question if self.query_aware else None


@dataclass(eq=False)
class Stored:
    """The passages of a compressed method as a store gives them back: quantised and dequantised by its own codec.

    Attributes:
        of: what makes the passages.
        encoding: how the store keeps their slots.
        nbytes: bytes of slots a passage in that store, the mean over those read last; 0 before.

    Raises:
        ValueError: if the compressor makes text, which a store does not round.
    """

    of: Compressed
    encoding: Encoding
    name: str = ""
    ratio: float | None = None
    nbytes: float = 0.0

    def __post_init__(self) -> None:
        if self.of.compressor.interface == "text":
            raise ValueError(
                f"{self.of.name} makes text, which a store keeps as it is; there is no precision to measure."
            )
        self.name = self.name or f"{self.of.name}-{self.precision}"
        self.ratio = self.of.ratio

    @property
    def precision(self) -> str:
        """`int8`, `int4` or a dtype."""
        return self.encoding.quantize or self.encoding.dtype or "as-made"

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        found: list[list[Piece]] = []
        sizes = []
        for pieces in self.of.contexts(reader, records):
            back = [round_trip(piece, self.encoding) for piece in pieces if isinstance(piece, CompressedPassage)]
            found.append([passage for passage, _ in back])
            sizes += [size for _, size in back]
        self.nbytes = sum(sizes) / max(len(sizes), 1)
        return found


@dataclass(eq=False)
class Shuffled:
    """The control: each question reads the compressed passages of another question, one with other passages.

    What a method scores here comes from the reader's own knowledge and the form of the slots, not from their content.
    """

    of: Compressed
    seed: int = 0
    name: str = ""
    ratio: float | None = None

    def __post_init__(self) -> None:
        self.name = self.name or f"{self.of.name}-shuffled"
        self.ratio = self.of.ratio

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return self.of.contexts(reader, strangers(records, self.seed))


@dataclass(eq=False)
class EqualBudget:
    """A text baseline under the budget of another method's prompts."""

    name: str
    of: Method
    seed: int = 0
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ValueError(f"There is no baseline {self.name!r}; known are {sorted(BASELINES)}.")
        self.ratio = self.of.ratio

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        baseline = BASELINES[self.name]
        budgets = map(reader_of(self.of, reader).length, prompts(self.of, reader, records))
        return [
            list(baseline(reader, record.question, record.passages, budget, random.Random(f"{self.seed}/{i}")))
            for i, (record, budget) in enumerate(zip(records, budgets))
        ]


def reader_of(method: Method, reader: Reader) -> Reader:
    """Who reads a line's prompts: `reader`, or the one that was tuned together with the line's compressor."""
    compressed = method.of if isinstance(method, Shuffled | Stored) else method
    return compressed.compressor.reader if isinstance(compressed, Compressed) else reader


def prompts(method: Method, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
    """The benchmark prompts of a method."""
    contexts = method.contexts(reader, records)
    return [question_prompt(pieces, record.question) for pieces, record in zip(contexts, records)]


def lines(
    compressed: Sequence[Compressed],
    *,
    baselines: Sequence[str],
    shuffled: bool,
    seed: int = 0,
    encodings: Sequence[Encoding] = (),
) -> list[Method]:
    """All lines of a table: the fixed ones, then each compressed method with its control and its baselines.

    With `encodings`, each method that makes slots is also read as stores with these encodings give them back.
    """
    out: list[Method] = [FullText(), NoContext()]
    for method in compressed:
        out.append(method)
        if method.compressor.interface != "text":
            out += [Stored(method, encoding) for encoding in encodings]
        if shuffled:
            out.append(Shuffled(method, seed))
        out += [EqualBudget(name, method, seed) for name in baselines]
    return out


def strangers(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """For each record another one that shares no passage with it, drawn at random.

    Raises ValueError if some record has no such partner.
    """
    rng = random.Random(seed)
    found = []
    for i, record in enumerate(records):
        own = set(record.passages)
        others = (records[k] for k in rng.sample(range(len(records)), len(records)))
        partner = next((other for other in others if own.isdisjoint(other.passages)), None)
        if partner is None:
            raise ValueError(f"Record {i} shares a passage with every other; the shuffled control needs more records.")
        found.append(partner)
    return found


def named_methods(reader: Reader, specs: Sequence[str], ratios: Sequence[float]) -> list[Compressed]:
    """The compressors that are named (`NAME@RATIO,RATIO`), each at each of its ratios or of those given."""
    found = []
    for text in specs:
        spec = CompressorSpec.parse(text, ratios)
        loaded = find_compressor(spec.name, reader)
        name = spec.name if ":" in spec.name and loaded.training_free else ""
        together: list[Compressed] = []
        for ratio in spec.ratios:
            together.append(Compressed(loaded, ratio, name, loaded.query_aware, together=together))
        found += together
    return found
