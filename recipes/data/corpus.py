"""Reads training files: documents of plain text and question records, plain or xz-compressed.

Text files hold documents separated by a line `<|doc|>`; question files are JSON lines with the fields `id, question, answers,
passages, gold, source`. Records keep the order of the file, so a seed determines the training data.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SEPARATOR = "<|doc|>"


def open_text(path: str | Path) -> TextIO:
    """Opens `path` as UTF-8 text; unpacks `.xz`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no data file {path}. Set data.dir in the recipe to the folder that holds it."
        )
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_documents(path: str | Path) -> Iterator[str]:
    """Yields the non-empty documents of a text file, stripped."""
    lines: list[str] = []
    with open_text(path) as file:
        for line in file:
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

    @property
    def gold_text(self) -> str:
        """Text of the gold passage, empty if there is none."""
        return "" if self.gold is None else self.passages[self.gold]


def parse_record(row: dict[str, Any], where: str = "record") -> Record:
    """Converts a JSON object; ValueError names `where` and the missing or wrong field."""
    missing = [key for key in ("question", "answers", "passages") if key not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: a question record needs question, answers and passages.")
    gold = row.get("gold")
    if gold is not None and not 0 <= gold < len(row["passages"]):
        raise ValueError(
            f"{where} has gold={gold} but {len(row['passages'])} passages: gold is an index of passages, or null."
        )
    return Record(
        question=" ".join(row["question"].split()),
        answers=tuple(answer.strip() for answer in row["answers"] if answer.strip()),
        passages=tuple(passage["text"].strip() for passage in row["passages"]),
        titles=tuple(passage.get("title", "") for passage in row["passages"]),
        gold=gold,
        source=row.get("source", ""),
        half=row.get("half"),
        id=row.get("id", ""),
    )


def read_records(path: str | Path, half: str | None = None, limit: int | None = None) -> list[Record]:
    """Reads a question file; optionally one `half`, at most `limit` records."""
    records: list[Record] = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(records) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            record = parse_record(row, f"{path}, line {number}")
            if half is None or record.half == half:
                records.append(record)
    return records


def find_files(folder: str | Path, names: Iterable[str]) -> list[Path]:
    """Paths of `names` (file names or glob patterns) in `folder`, each pattern's matches sorted."""
    folder = Path(folder)
    found: list[Path] = []
    for name in names:
        matches = sorted(folder.glob(name))
        if not matches:
            raise FileNotFoundError(
                f"No file in {folder} matches {name!r}. Set data.dir to the folder that holds the data."
            )
        found += matches
    return found
