"""The lines of a quality table: each turns records into the contexts that the reader reads.

`FullText` and `NoContext` are the fixed lines, `Compressed` is what is measured, `Stored` the same after a store rounded its
slots, `Shuffled` its control, and `EqualBudget` a text baseline with as many reader positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.store import Encoding
from ..adapters.store.codec import round_trip
from ..compressors import CompressedPassage, Compressor, Reader, load_compressor
from ..compressors.core.textfiles import check_strings
from ..recipes.data.corpus import Record
from ..recipes.data.templates import Piece, Prompt, question_prompt
from .baselines import BASELINES
from .loading import CompressorSpec
from .rows import Row


class Method:
    """A line of the table.

    Attributes:
        name: Of the line, in tables and rows.
        ratio: Compression ratio asked for, if any.
        compressor: The line's own, or that of the line whose control or budget this is.
        made_by: The line that compresses its passages, if any.
    """

    name: str
    ratio: float | None = None
    compressor: Any = None
    made_by: Compressed | None = None

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        """For each record the pieces (texts, compressed passages) before its question, in reading order."""
        raise NotImplementedError

    def follow(self, of: Compressed, name: str) -> None:
        """Read the passages of another line, under another name."""
        self.name, self.ratio, self.compressor, self.made_by = name, of.ratio, of.compressor, of

    def reads(self, reader: Reader) -> Reader:
        """The reader of the line's prompts: `reader`, or the one that was tuned together with the line's compressor."""
        return reader if self.made_by is None else self.made_by.compressor.reader

    def about(self) -> Row:
        """Interface of a line, whether the question was seen, whether the reader was tuned."""
        if self.made_by is None:
            return {"interface": "text"}
        made_by = self.made_by.compressor
        facts = {"query_aware": self.made_by.query_aware, "reader_tuned": made_by.reader is not made_by.base_reader}
        return {"interface": made_by.interface} | {name: True for name, true in facts.items() if true}

    @property
    def label(self) -> str:
        """Name with the ratio."""
        return self.name + (f" {self.ratio:g}x" if self.ratio else "")


class FullText(Method):
    """The upper fixed line: every passage as it is."""

    name = "full"

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [list(record.passages) for record in records]


class NoContext(Method):
    """The lower fixed line: the question alone."""

    name = "none"

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return [[] for _ in records]


@dataclass(eq=False)
class Compressed(Method):
    """Every passage compressed on its own. Shared passages are compressed once, unless the question matters.

    Attributes:
        ratio: Compression ratio to ask for; None: the compressor's own.
        query_aware: Give the question to the compressor, so that every (passage, question) pair is compressed.
        together: The same compressor at all its ratios, which may then read every passage once.
    """

    compressor: Compressor
    ratio: float | None = None
    name: str = ""
    query_aware: bool = False
    together: list[Compressed] = field(default_factory=list, repr=False)
    _made: dict[tuple[str, str | None], CompressedPassage] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.follow(self, self.name or self.compressor.config.method + "-query" * self.query_aware)

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        wanted = [[(text, self._query(record)) for text in record.passages] for record in records]
        new = list(dict.fromkeys(key for keys in wanted for key in keys if key not in self._made))
        if new:
            texts, queries = [text for text, _ in new], [query for _, query in new]
            asked = queries if self.query_aware else None
            group = self.together or [self]
            # Passages that share a budget must be in one batch.
            size = None if self.compressor.pools_budget else 32
            made = self.compressor.compress_at(texts, [one.ratio for one in group], asked, batch_size=size)
            for one, passages in zip(group, made):
                one._made.update(zip(new, passages))
        return [[self._made[key] for key in keys] for keys in wanted]

    def fresh_prompt(self, records: Sequence[Record], i: int) -> list[Piece]:
        """The prompt of the i-th record, with its passages compressed again."""
        made = self.compressor.compress(list(records[i].passages), self._query(records[i]), self.ratio)
        return question_prompt(made, records[i].question)

    def _query(self, record: Record) -> str | None:
        return record.question if self.query_aware else None


@dataclass(eq=False)
class Stored(Method):
    """Compressed passages as a store gives them back, rounded by its codec.

    Attributes:
        nbytes: Mean bytes per passage in that store, of those read last.

    Raises:
        ValueError: If the compressor makes text, which a store does not round.
    """

    of: Compressed
    encoding: Encoding
    nbytes: float = 0.0

    def __post_init__(self) -> None:
        if self.of.compressor.interface == "text":
            raise ValueError(
                f"{self.of.name} makes text, which a store keeps as it is; there is no precision to measure."
            )
        self.follow(self.of, f"{self.of.name}-{self.precision}")

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
class Shuffled(Method):
    """The control: each question reads the compressed passages of another question.

    What a method scores here comes from the reader's knowledge and the form of the slots, not from their content.
    """

    of: Compressed
    seed: int = 0

    def __post_init__(self) -> None:
        self.follow(self.of, f"{self.of.name}-shuffled")

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        return self.of.contexts(reader, strangers(records, self.seed))


@dataclass(eq=False)
class EqualBudget(Method):
    """A text baseline under the budget of another method's prompts."""

    name: str
    of: Method
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ValueError(f"There is no baseline {self.name!r}; known are {sorted(BASELINES)}.")
        self.ratio, self.compressor = self.of.ratio, self.of.compressor

    @property
    def label(self) -> str:
        return f"{self.name} (budget of {self.of.label})"

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        baseline = BASELINES[self.name]
        budgets = map(self.of.reads(reader).length, prompts(self.of, reader, records))
        return [
            list(baseline(reader, record.question, record.passages, budget, random.Random(f"{self.seed}/{i}")))
            for i, (record, budget) in enumerate(zip(records, budgets))
        ]


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
        loaded = load_compressor(spec.name, reader)
        _, colon, settings = spec.name.partition(":")
        own = spec.name if loaded.training_free else f"{loaded.config.method}:{settings}"
        name = own if colon and not Path(spec.name).exists() else ""
        together: list[Compressed] = []
        for ratio in spec.ratios:
            together.append(Compressed(loaded, ratio, name, loaded.query_aware, together=together))
        found += together
    return found


def prompt_size(reader: Reader, prompt: Prompt) -> int:
    """Tokens and slots of a prompt; a ragged KV passage counts its pairs per head, not the positions that it spans."""
    (plan,) = reader.plan([prompt])
    return len(plan) - sum(passage.places - passage.slots for _, passage in plan.kv)
