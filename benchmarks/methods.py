"""The lines of a quality table: each turns records into the contexts that the reader reads.

`FullText` and `NoContext` are the fixed lines, `Compressed` is what is measured, `Stored` the same after a store rounded its
slots, `Shuffled` its control, and `EqualBudget` a text baseline with as many reader positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..adapters.store import Encoding
from ..adapters.store.codec import round_trip
from ..compressors import CompressedPassage, Compressor, Reader
from ..compressors.core.textfiles import check_strings
from ..recipes.data.corpus import Record
from ..recipes.data.templates import Piece, Prompt, question_prompt
from .baselines import BASELINES
from .loading import CompressorSpec, find_compressor


class Method(Protocol):
    """A line of the table. `ratio` is the compression ratio asked for, if any."""

    name: str
    ratio: float | None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        """For each record the pieces (texts, compressed passages) before its question, in reading order."""
        ...


class FullText:
    """The upper fixed line: every passage as it is."""

    name: str = "full"
    ratio: float | None = None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [list(record.passages) for record in records]


class NoContext:
    """The lower fixed line: the question alone."""

    name: str = "none"
    ratio: float | None = None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [[] for _ in records]


@dataclass(eq=False)
class Compressed:
    """Every passage compressed on its own. Shared passages are compressed once, unless the question matters.

    Attributes:
        ratio: Compression ratio to ask for; None: the compressor's own.
        query_aware: Give the question to the compressor, so that every (passage, question) pair is compressed.
        options: Further options of `Compressor.compress`.
        together: The same compressor at all its ratios, which may then read every passage once.
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

    def fresh_prompt(self, records: Sequence[Record]) -> Callable[[int], list[Piece]]:
        """Makes the prompt of the i-th record, compressing its passages again, without the cache."""

        def prompt(i: int) -> list[Piece]:
            texts, query = list(records[i].passages), self._query(records[i])
            made = self.compressor.compress(texts, query, self.ratio, **self.options)  # type: ignore[arg-type]
            return question_prompt(made, records[i].question)

        return prompt

    def _query(self, record: Record) -> str | None:
        return record.question if self.query_aware else None


@dataclass(eq=False)
class Stored:
    """Compressed passages as a store gives them back, rounded by its codec.

    Attributes:
        nbytes: Mean bytes per passage in that store, of those read last.

    Raises:
        ValueError: If the compressor makes text, which a store does not round.
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
    """The control: each question reads the compressed passages of another question.

    What a method scores here comes from the reader's knowledge and the form of the slots, not from their content.
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
    """The reader of a line's prompts: `reader`, or the one that was tuned together with the line's compressor."""
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

    `encodings`: methods that make slots are also read as stores with these encodings give them back.
    """
    baselines = check_strings("baselines", baselines, "names")
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
    """For each record another one without a passage in common, at random. Raises ValueError if a record has none."""
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
    """Lines of compressors named `NAME@RATIO,RATIO`, at each of their ratios, or of `ratios` if they name none."""
    found = []
    for text in check_strings("specs", specs, "compressors"):
        spec = CompressorSpec.parse(text, ratios)
        loaded = find_compressor(spec.name, reader)
        name = spec.name if ":" in spec.name and loaded.training_free else ""
        together: list[Compressed] = []
        for ratio in spec.ratios:
            together.append(Compressed(loaded, ratio, name, loaded.query_aware, together=together))
        found += together
    return found


def prompt_size(reader: Reader, prompt: Prompt) -> int:
    """Tokens and slots of a prompt; a ragged KV passage counts its pairs per head, not the positions that it spans."""
    (plan,) = reader.plan([prompt])
    return len(plan) - sum(passage.places - passage.slots for _, passage in plan.kv)
