"""Reads training files: documents of plain text and question records, plain or packed (`.xz`, `.gz`).

Text files hold documents separated by a line `<|doc|>`; question files are JSON lines with the fields `id, question, answers,
passages, gold, source`, or SQuAD's. Records keep the order of the file, so a seed determines the training data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ...compressors.core.textfiles import check_strings, parse_row, read_json_lines, read_lines

SEPARATOR = "<|doc|>"


def read_documents(path: str | Path) -> Iterator[str]:
    """Yields the non-empty documents of a text file, stripped."""
    lines: list[str] = []
    for line in read_lines(path):
        if line.rstrip("\n") != SEPARATOR:
            lines.append(line)
            continue
        if text := "".join(lines).strip():
            yield text
        lines = []
    if text := "".join(lines).strip():
        yield text


def split_paragraphs(document: str) -> list[str]:
    """Paragraphs of a document (separated by blank lines), without its `# Title` line."""
    parts = (part.strip() for part in document.split("\n\n"))
    return [part for part in parts if part and not part.startswith("# ")]


@dataclass(frozen=True)
class Record:
    """One question. `gold` is the index of the passage with the answer, or None."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    titles: tuple[str, ...]
    gold: int | None
    source: str
    half: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("answers", "passages", "titles"):
            check_strings(name, getattr(self, name))

    @property
    def gold_text(self) -> str:
        """Text of the gold passage, empty if there is none."""
        return "" if self.gold is None else self.passages[self.gold]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class PassageRow(_Strict):
    """A passage of a question row: an object with `text` and perhaps `title`, or the text alone."""

    text: str
    title: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"text": given}
        if isinstance(given, dict):
            return given | {"title": ""} if given.get("title") is None else given
        raise ValueError("must be a string or an object with a string 'text'")


class QuestionRow(_Strict):
    """A row of a question file. Further fields are left out.

    `answers` is a list of strings, one string (one answer), `{"text": [...]}` (SQuAD) or a list of `{"text": ...}`.
    SQuAD's `context` stands for `passages`; it is the gold passage if there is an answer.
    """

    question: str
    answers: list[str]
    passages: list[PassageRow]
    gold: int | None = None
    source: str = ""
    half: str | None = None
    id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_squad(cls, row: dict[str, Any]) -> dict[str, Any]:
        row = {key: value for key, value in row.items() if value is not None or key not in ("id", "source")}
        if "context" not in row or "passages" in row:
            return row
        answers = _answers(row.get("answers") or [])
        passage = {"text": row["context"], "title": row.get("title")}
        return row | {"answers": answers, "passages": [passage], "gold": 0 if answers else None}

    @field_validator("question")
    @classmethod
    def _asked(cls, question: str) -> str:
        if not (question := " ".join(question.split())):
            raise ValueError("must not be blank")
        return question

    @field_validator("id", mode="before")
    @classmethod
    def _numbered(cls, given: Any) -> Any:
        return str(given) if type(given) is int else given

    @field_validator("answers", mode="before")
    @classmethod
    def _listed(cls, answers: Any) -> Any:
        return _answers(answers)

    @model_validator(mode="after")
    def _gold_is_there(self) -> QuestionRow:
        if self.gold is not None and not 0 <= self.gold < len(self.passages):
            raise ValueError(
                f"gold={self.gold} but {len(self.passages)} passages: gold is an index of passages, or null"
            )
        return self


def _answers(given: Any) -> Any:
    """The list of answers in one of the known shapes; anything else as it is, for pydantic to refuse."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict) and "text" in given:
        return _answers(given["text"])
    if isinstance(given, list):
        return [item["text"] if isinstance(item, dict) and "text" in item else item for item in given]
    return given


def parse_record(row: Any, where: str = "record") -> Record:
    """Converts a row of a known shape (see `QuestionRow`); ValueError names `where` and the missing or wrong fields."""
    found = parse_row(QuestionRow, row, where)
    return Record(
        question=found.question,
        answers=tuple(answer.strip() for answer in found.answers if answer.strip()),
        passages=tuple(passage.text.strip() for passage in found.passages),
        titles=tuple(passage.title for passage in found.passages),
        gold=found.gold,
        source=found.source,
        half=found.half,
        id=found.id,
    )


def read_records(path: str | Path, half: str | None = None, limit: int | None = None) -> list[Record]:
    """Reads a question file; optionally one `half`, at most `limit` records."""
    records: list[Record] = []
    for _, where, row in read_json_lines(path):
        if limit is not None and len(records) >= limit:
            break
        record = parse_record(row, where)
        if half is None or record.half == half:
            records.append(record)
    return records


class PairRow(_Strict):
    """A text and its compressed form."""

    original: str
    compressed: str


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields the pairs of a file of JSON lines `{"original": ..., "compressed": ...}`."""
    for _, where, row in read_json_lines(path):
        pair = parse_row(PairRow, row, where)
        yield pair.original, pair.compressed


def find_files(folder: str | Path, names: Iterable[str]) -> list[Path]:
    """Paths of `names` (file names or glob patterns) in `folder`, each pattern's matches sorted."""
    folder = Path(folder)
    found: list[Path] = []
    for name in check_strings("names", names, "file names or patterns"):
        matches = sorted(folder.glob(name))
        if not matches:
            raise FileNotFoundError(
                f"No file in {folder} matches {name!r}. Set data.dir to the folder that holds the data."
            )
        found += matches
    return found
