"""One budget of slots per question: the same ratio for every passage, or slots by retrieval score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...compressors import CompressedPassage, Reader
from ...compressors.core.textfiles import check_strings
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece
from .. import metrics
from ..baselines import Scorer, bm25, cosine
from ..methods import Compressed, FullText, Method, NoContext
from ..quality.quality import Line, Settings, evaluate
from ..rows import Row, clean

SCORERS: dict[str, Scorer] = {"embedder": cosine, "bm25": bm25}


def gold_score(record: Record) -> list[float]:
    """1 for the passage that holds the answer, 0 for the others: a perfect retriever."""
    return [float(i == record.gold) for i in range(len(record.passages))]


@dataclass(eq=False)
class ByScore(Compressed):
    """The slots that `Compressed` makes of a question's passages, divided between them by score.

    Attributes:
        scorer: `embedder`, `bm25`, or `gold` for the passage that is known to hold the answer.
        temperature, lowest: See `adapters.llama_index.allocation.allocate`.

    Raises:
        ValueError: For another scorer, or a compressor that makes text.
    """

    scorer: str = "embedder"
    temperature: float = 1.0
    lowest: float = 1.0
    _by_ratio: dict[tuple[str, float, str | None], CompressedPassage] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer != "gold" and self.scorer not in SCORERS:
            raise ValueError(f"There is no score {self.scorer!r}; known are {', '.join(SCORERS)} and gold.")
        if self.compressor.interface == "text":
            raise ValueError(f"{self.name} makes text; slots are divided for compressors to slots.")

    def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Piece]]:
        uniform = super().contexts(reader, records)
        return [self._divided(reader, record, pieces) for record, pieces in zip(records, uniform)]

    def slots(self, reader: Reader, record: Record, budget: int) -> list[int]:
        """Slots of each passage of a record under a budget."""
        # Here and below: a machine that only measures may lack llama-index.
        from ...adapters.llama_index.allocation import allocate

        tokens = [len(ids) for ids in reader.tokenize_batch(list(record.passages))]
        score = SCORERS.get(self.scorer)
        scores = gold_score(record) if score is None else score(record.question, record.passages)
        return allocate(tokens, scores, budget, temperature=self.temperature, lowest=self.lowest)

    def _divided(self, reader: Reader, record: Record, uniform: Sequence[Piece]) -> list[Piece]:
        from ...adapters.llama_index.allocation import ratio_of

        budget = sum(piece.slots for piece in uniform if isinstance(piece, CompressedPassage))
        found: list[Piece] = []
        query = self._query(record)
        for text, slots in zip(record.passages, self.slots(reader, record, budget)):
            if slots:
                ratio = ratio_of(len(reader.tokenize(text)), slots)
                key = (text, ratio, query)
                if key not in self._by_ratio:
                    self._by_ratio[key] = self.compressor.compress([text], query, ratio)[0]
                found.append(self._by_ratio[key])
        return found


def allocation_rows(
    reader: Reader,
    methods: Sequence[Compressed],
    records: Sequence[Record],
    settings: Settings,
    *,
    scorers: Sequence[str] = ("embedder",),
    temperatures: Sequence[float] = (1.0,),
    lowest: float = 1.0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Rows of the fixed lines, of each method at one ratio (`allocation` = "uniform"), and of its slots by score.

    Rows by score carry `score`, `temperature` and, paired by question, `f1_minus_uniform` and `nll_minus_uniform` (nats of the
    reference answer, lower is better) with 95 % bootstrap intervals. Raises ValueError as `evaluate` and `ByScore` do.
    """
    scorers = check_strings("scorers", scorers, "names")
    table: list[Method] = [FullText(), NoContext()]
    for method in methods:
        table.append(method)
        shared = (method.compressor, method.ratio, method.name, method.query_aware)
        table += [ByScore(*shared, scorer=s, temperature=t, lowest=lowest) for s in scorers for t in temperatures]
    rows: list[Row] = []
    last: list[Line] = []  # the uniform line that the ones by score follow

    def keep(line: Line) -> None:
        method = table[len(rows)]
        more: Row = {"test": "allocation"}
        if isinstance(method, ByScore):
            more |= {"allocation": "score", "score": method.scorer, "temperature": method.temperature}
            more |= _against(line, last[-1], settings.seed)
        elif isinstance(method, Compressed):
            more["allocation"] = "uniform"
            last.append(line)
        rows.append(clean(line.row | more))
        on_row(rows[-1])

    evaluate(reader, table, records, settings, keep)
    return rows


def _against(line: Line, uniform: Line, seed: int) -> Row:
    found: Row = {}
    for name in ("f1", "nll"):
        if name in line.scores:
            change: np.ndarray = line.scores[name] - uniform.scores[name]
            low, high = metrics.bootstrap_mean(change, seed=seed)
            key = f"{name}_minus_uniform"
            found |= {key: float(change.mean()), f"{key}_low": low, f"{key}_high": high}
    return found
