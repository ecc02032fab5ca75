"""Finds overlap of training texts with held-out files by word n-grams.

Two texts overlap if they share `n` consecutive words (lower case, letters and digits only). Questions are compared whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...compressors.core.textfiles import LINES, kind_of
from .corpus import read_documents, read_records

WORD = re.compile(r"[^\W_]+")
PASSAGE_WORDS, QUESTION_WORDS = 20, 6


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def ngrams(text: str, n: int) -> Iterator[int]:
    found = words(text)
    for start in range(len(found) - n + 1):
        yield hash(" ".join(found[start : start + n]))


@dataclass
class HeldOut:
    """N-grams of passages, and questions, that must not be trained on.

    Questions of fewer than `QUESTION_WORDS` words (`Who won?`) are too general and not compared.
    """

    n: int = PASSAGE_WORDS
    grams: set[int] = field(default_factory=set)
    questions: set[tuple[str, ...]] = field(default_factory=set)

    @classmethod
    def from_files(cls, files: Iterable[Path], n: int = PASSAGE_WORDS) -> HeldOut:
        """Collects questions and gold passages of question files (`.jsonl`) and documents of text files."""
        held = cls(n)
        for path in files:
            if kind_of(path) not in LINES:
                for document in read_documents(path):
                    held.add_passage(document)
                continue
            for record in read_records(path):
                held.add_question(record.question)
                if record.gold is not None:
                    held.add_passage(record.gold_text)
        return held

    def add_passage(self, text: str) -> None:
        self.grams.update(ngrams(text, self.n))

    def add_question(self, text: str) -> None:
        if len(found := words(text)) >= QUESTION_WORDS:
            self.questions.add(tuple(found))

    def has_passage(self, text: str) -> bool:
        """Whether the text shares `n` consecutive words with a held-out passage."""
        return bool(self.grams) and any(gram in self.grams for gram in ngrams(text, self.n))

    def has_question(self, text: str) -> bool:
        """Whether the text is a held-out question."""
        return tuple(words(text)) in self.questions
