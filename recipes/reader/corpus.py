"""Training material of the small reader: articles by paragraph, human questions by passage."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ...compressors.fidelity.questions import sentences
from ..data.corpus import Record, find_files
from ..data.overlap import HeldOut
from ..data.records import Asked, cut_at_sentence, load_articles, load_records

MAX_ANSWER_WORDS = 12
# Share of the human passages drawn from each source; sources that are not named share `other`.
SOURCE_SHARE = {"squad": 0.5, "qamr": 0.35, "fairytaleqa": 0.08, "other": 0.07}


def pick_answer(record: Record) -> str | None:
    """The shortest reference answer in the gold passage; None if there is none or all are too long."""
    found = [a for a in record.answers if a in record.gold_text and len(a.split()) <= MAX_ANSWER_WORDS]
    return min(found, key=len) if found else None


class ReaderCorpus:
    """All training material, in memory.

    Args:
        folder: folder of the data files.
        texts: names or patterns of text files; `documents` articles of each are used (None: all).
        questions: names of question files.
        held_out: overlapping paragraphs are not drawn, held-out questions not kept.
    """

    def __init__(
        self,
        folder: str | Path,
        texts: Sequence[str],
        questions: Sequence[str],
        documents: int | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.held_out = held_out or HeldOut()
        self.text_files = find_files(folder, texts)
        self.records = load_records(questions, folder)
        found = ([text for text in article if len(text) >= 120] for article in load_articles(texts, folder, documents))
        self.articles = [paragraphs for paragraphs in found if paragraphs]
        if not self.articles:
            raise ValueError(f"The text files in {folder} hold no paragraph of 120 characters: nothing to train on.")
        self.asked, self.many = self._group_questions()
        self.answers = [answer for group in self.asked["squad"] + self.asked["qamr"] for _, answer in group.pairs]

    def _group_questions(self) -> tuple[dict[str, list[Asked]], list[tuple[Record, str]]]:
        by_passage: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        many: list[tuple[Record, str]] = []  # records with several passages, and their answers
        for record in self.records:
            answer = pick_answer(record)
            if answer is None or record.gold is None or self.held_out.has_question(record.question):
                continue
            if any(map(self.held_out.has_passage, record.passages)):
                continue
            if len(record.passages) > 1:
                many.append((record, answer))
            family = next((name for name in SOURCE_SHARE if record.source.startswith(name)), "other")
            by_passage[family, record.gold_text].append((record.question, answer))
        asked: dict[str, list[Asked]] = {name: [] for name in SOURCE_SHARE}
        for (family, passage), pairs in by_passage.items():
            asked[family].append(Asked(passage, tuple(pairs), family))
        return asked, many

    def article(self, rng: random.Random) -> list[str]:
        """A random article as paragraphs, without held-out ones."""
        while True:
            if kept := [text for text in rng.choice(self.articles)[:20] if not self.held_out.has_passage(text)]:
                return kept

    def paragraph(self, rng: random.Random, max_chars: int = 1200) -> str:
        """A random paragraph, cut at a sentence end if it is longer than `max_chars` characters."""
        while self.held_out.has_passage(text := rng.choice(rng.choice(self.articles))):
            pass
        return cut_at_sentence(text, max_chars)

    def human(self, rng: random.Random) -> Asked:
        """A random passage with human questions, by the shares of `SOURCE_SHARE`."""
        names = [name for name in SOURCE_SHARE if self.asked[name]]
        if not names:
            raise ValueError("The question files hold no answer that stands in its passage: nothing human to train on.")
        family = rng.choices(names, [SOURCE_SHARE[name] for name in names])[0]
        if family != "qamr":
            return rng.choice(self.asked[family])
        # QAMR passages are single sentences: join a few, so that the question has to find its own.
        parts = [rng.choice(self.asked["qamr"]) for _ in range(rng.choice([1, 1, 2, 3, 4]))]
        return Asked(" ".join(part.passage for part in parts), tuple(p for part in parts for p in part.pairs), "qamr")

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A human question with its answer, of any passage."""
        return rng.choice(self.human(rng).pairs)


def window(text: str, max_chars: int, rng: random.Random) -> str:
    """Whole sentences from a random place in `text`, about `max_chars` characters, at least one sentence."""
    bounds = sentences(text)
    first = rng.randrange(len(bounds)) if bounds else 0
    while first and len(text) - bounds[first][0] < max_chars // 2:
        first -= 1
    last = first
    while last + 1 < len(bounds) and bounds[last + 1][1] - bounds[first][0] <= max_chars:
        last += 1
    return text[bounds[first][0] : bounds[last][1]] if bounds else text
