"""Loads training texts and questions from local files or datasets of the Hugging Face hub.

A source is a file name or pattern inside `data.dir` (JSON lines of records, or text, plain or xz-compressed), or
`hub:OWNER/NAME[/CONFIG][:SPLIT]`. Question rows follow the public schema `{id, question, answers, passages, gold}`, or
SQuAD's `{question, context, answers: {text: [...]}}`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...compressors.core.textfiles import check_strings
from .corpus import Record, find_files, parse_record, read_documents, read_records, split_paragraphs

HUB = "hub:"


def load_records(sources: Iterable[str], folder: str | Path | None = None, half: str | None = None) -> list[Record]:
    """Question records of `sources`, in order; of one `half` if given.

    Raises:
        FileNotFoundError: if a file or pattern matches nothing.
        ValueError: if a row is no question record.
    """
    records: list[Record] = []
    for source in check_strings("sources", sources):
        if source.startswith(HUB):
            rows = enumerate(_hub_rows(source))
            found = [parse_record(row, f"{source}, row {number}") for number, row in rows]
            records += [record for record in found if half is None or record.half == half]
        else:
            for path in find_files(need_folder(folder, source), [source]):
                records += read_records(path, half)
    return records


def load_articles(
    sources: Iterable[str], folder: str | Path | None = None, limit: int | None = None
) -> Iterator[list[str]]:
    """Paragraphs of each document of `sources`, at most `limit` documents per source file."""
    for source in check_strings("sources", sources):
        if source.startswith(HUB):
            documents = (_text_of(row, source) for row in _hub_rows(source))
            yield from map(split_paragraphs, islice(documents, limit))
        else:
            for path in find_files(need_folder(folder, source), [source]):
                yield from map(split_paragraphs, islice(read_documents(path), limit))


def need_folder(folder: str | Path | None, source: str) -> str | Path:
    if folder is None:
        raise ValueError(f"The data file {source!r} needs data.dir, the folder that holds it: data.dir=FOLDER.")
    return folder


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise ValueError(f"{source!r} names no dataset of the hub; write hub:OWNER/NAME[/CONFIG][:SPLIT].")
    yield from load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)


def _text_of(row: dict[str, Any], source: str) -> str:
    if not isinstance(text := row.get("text"), str):
        raise ValueError(f"A row of {source!r} has no text in a field called 'text'; its fields are {sorted(row)}.")
    return text


@dataclass(frozen=True)
class Asked:
    """A passage and its pairs (question, answer)."""

    passage: str
    pairs: tuple[tuple[str, str], ...]
    source: str


class Material:
    """Paragraphs and questions in memory, to draw training items from.

    Args:
        records: question records; answers of at most `max_answer_words` words are used, with `verbatim` only those that
            occur in the gold passage.
        articles: documents as lists of paragraphs.
        max_chars: longer passages of questions are left out, longer paragraphs cut at a sentence.
        shares: weight of each source in `human`, by the start of its name; other sources are left out. Default: sources
            weigh as much as they have passages.

    Attributes:
        asked: passages with their questions, by source.
        articles: paragraphs of at least 80 characters, by document.
    """

    def __init__(
        self,
        records: Sequence[Record],
        articles: Iterable[Sequence[str]],
        max_chars: int = 1600,
        max_answer_words: int = 12,
        verbatim: bool = True,
        shares: dict[str, float] | None = None,
    ) -> None:
        self.max_chars = max_chars
        grouped: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for record in records:
            text = record.gold_text
            answers = [answer for answer in record.answers if len(answer.split()) <= max_answer_words]
            if verbatim:
                answers = [answer for answer in answers if answer in text]
            if text and answers and len(text) <= max_chars:
                grouped[record.source, text].append((record.question, min(answers, key=len)))
        self.asked: dict[str, list[Asked]] = defaultdict(list)
        for (source, text), pairs in grouped.items():
            self.asked[_share_of(source, shares)].append(Asked(text, tuple(pairs), source))
        self.articles = [kept for paragraphs in articles if (kept := [p for p in paragraphs if len(p) >= 80])]
        self._names = [name for name in self.asked if shares is None or name in shares]
        self._weights = [len(self.asked[name]) if shares is None else shares[name] for name in self._names]

    def human(self, rng: random.Random) -> Asked:
        """A random passage with human questions."""
        if not self._names:
            raise ValueError("There are no usable question records: list question files under data.questions.")
        return rng.choice(self.asked[rng.choices(self._names, self._weights)[0]])

    def paragraph(self, rng: random.Random, max_chars: int | None = None) -> str:
        """A random paragraph, cut at a sentence if long."""
        return cut_at_sentence(rng.choice(self._article(rng)), min(max_chars or self.max_chars, self.max_chars))

    def text_and_continuation(self, rng: random.Random) -> tuple[str, str]:
        """A stretch of an article, split between words into the passage and its continuation."""
        article = self._article(rng)
        start = rng.randrange(len(article))
        text = "\n\n".join(article[start : start + 3])[: 2 * self.max_chars]
        cut = min(self.max_chars, int(len(text) * rng.uniform(0.4, 0.75)))
        cut = max(text.rfind(" ", 0, cut), text.rfind("\n\n", 0, cut))
        if cut < 40:
            return text, ""
        rest = text[cut : cut + self.max_chars // 2]
        return text[:cut], rest if len(rest) < self.max_chars // 2 else rest.rsplit(" ", 1)[0]

    def document(self, rng: random.Random, max_chars: int) -> str:
        """Consecutive paragraphs that start in the first half of an article, cut at a sentence."""
        article = self._article(rng)
        return cut_at_sentence("\n\n".join(article[rng.randrange(-(-len(article) // 2)) :]), max_chars)

    def distractor(self, rng: random.Random, other_than: str) -> str:
        """A passage other than `other_than`."""
        for _ in range(8):
            text = self.human(rng).passage if self._names and (not self.articles or rng.random() < 0.5) else ""
            text = text or self.paragraph(rng)
            if text != other_than:
                return text
        raise ValueError("The data holds too few different passages to put several of them into one prompt.")

    def _article(self, rng: random.Random) -> list[str]:
        if not self.articles:
            raise ValueError("There are no paragraphs to train on: list text files under data.texts.")
        return rng.choice(self.articles)


def _share_of(source: str, shares: dict[str, float] | None) -> str:
    return next((name for name in shares or {} if source.startswith(name)), source)


def cut_at_sentence(text: str, max_chars: int) -> str:
    """Cuts to at most `max_chars` characters, at a sentence end in the last two thirds if there is one."""
    if len(text) <= max_chars:
        return text
    end = text.rfind(". ", max_chars // 3, max_chars)
    return text[: end + 1] if end > 0 else text[:max_chars].rsplit(" ", 1)[0]
