"""Questions read from mixes of text and compressed passages."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...recipes.data.corpus import Record
from ...recipes.data.templates import Prompt, question_prompt
from ..methods import Compressed
from ..quality.quality import Settings, answer_prompts
from ..quality.scoring import likelihoods, score_each

Sent = frozenset[str]  # the passages that are read as text


@dataclass(frozen=True)
class Reading:
    """Scores and reader tokens of all questions, arrays `[records]`."""

    f1: np.ndarray
    em: np.ndarray
    containment: np.ndarray
    tokens: np.ndarray


class Mixture:
    """Records with passages read as text or compressed; no prompt is read twice.

    Args:
        method: Compresses the passages, without the question.
        records: All of them fit into the reader as full text.
    """

    def __init__(self, method: Compressed, records: Sequence[Record], settings: Settings) -> None:
        if method.query_aware:
            raise ValueError(f"{method.name} compresses for the question; a gate judges passages before there is one.")
        self.reader = method.compressor.reader
        self.method = method
        self.records = records
        self.settings = settings
        contexts = method.contexts(self.reader, records)
        self.passages = {text: piece for r, pieces in zip(records, contexts) for text, piece in zip(r.passages, pieces)}
        self.counts = Counter(text for record in records for text in record.passages)
        lengths = map(len, self.reader.tokenize_batch(list(self.passages)))
        self.saved = {t: n - p.slots for (t, p), n in zip(self.passages.items(), lengths)}  # type: ignore[union-attr]
        self.extra = {text: self.counts[text] * n for text, n in self.saved.items()}
        self._read: dict[tuple[int, tuple[bool, ...]], tuple[float, float, float, int]] = {}

    def read(self, sendings: Sequence[Collection[str]]) -> list[Reading]:
        """Read the questions under each choice of passages sent as text, in common batches."""
        wanted = [[(i, self._mask(r, sent)) for i, r in enumerate(self.records)] for sent in map(frozenset, sendings)]
        new = list(dict.fromkeys(key for keys in wanted for key in keys if key not in self._read))
        prompts = [self._prompt(*key) for key in new]
        guesses = answer_prompts(self.reader, prompts, self.settings, f"{self.method.label}, mixed with text")
        scores = score_each(guesses, [self.records[i] for i, _ in new])
        for key, prompt, *each in zip(new, prompts, scores["f1"], scores["em"], scores["containment"]):
            self._read[key] = (*each, self.reader.length(prompt))  # type: ignore[assignment]
        columns = (np.array([self._read[key] for key in keys], dtype=float).T for keys in wanted)
        return [Reading(*column) for column in columns]

    def probabilities(self, sent: Collection[str]) -> np.ndarray:
        """`[records]`: geometric mean probability per token of the first reference answer."""
        sent = frozenset(sent)
        prompts = [self._prompt(i, self._mask(record, sent)) for i, record in enumerate(self.records)]
        references = [self.reader.tokenize(" " + record.answers[0]) for record in self.records]
        found = likelihoods(self.reader, prompts, references, batch_size=self.settings.batch_size)
        return np.exp([float(item.log_probs.mean()) for item in found])

    def within(self, budget: float, order: Iterable[str], *, skip: bool) -> Sent:
        """Passages, in order, whose texts cost at most `budget` more reader tokens.

        Stops at the first that does not fit, or with `skip` leaves it out and continues.
        """
        sent, left = set(), budget
        for text in order:
            if self.extra[text] <= left + 1e-9:
                sent.add(text)
                left -= self.extra[text]
            elif not skip:
                break
        return frozenset(sent)

    def first(self, share: float, order: Iterable[str]) -> Sent:
        """The first passages of an order that make up about a share of all passages read."""
        wanted, sent, seen = share * sum(self.counts.values()), set(), 0
        for text in order:
            if seen + self.counts[text] / 2 > wanted:
                break
            sent.add(text)
            seen += self.counts[text]
        return frozenset(sent)

    def at_random(self, like: Sent, seed: str) -> Sent:
        """Random passages that cost about as many reader tokens as `like`."""
        order = sorted(self.passages)
        random.Random(seed).shuffle(order)
        return self.within(sum(self.extra[text] for text in like), order, skip=True)

    def share(self, sent: Collection[str]) -> float:
        """Share of all passages read that is read as text."""
        return sum(self.counts[text] for text in sent) / max(sum(self.counts.values()), 1)

    @staticmethod
    def _mask(record: Record, sent: Collection[str]) -> tuple[bool, ...]:
        return tuple(text in sent for text in record.passages)

    def _prompt(self, place: int, mask: tuple[bool, ...]) -> Prompt:
        record = self.records[place]
        pieces = [text if as_text else self.passages[text] for text, as_text in zip(record.passages, mask)]
        return question_prompt(pieces, record.question)


def mean_reading(readings: Sequence[Reading]) -> Reading:
    """Mean over readings, question by question."""
    names = ("f1", "em", "containment", "tokens")
    return Reading(*(np.mean([getattr(reading, name) for reading in readings], axis=0) for name in names))
