"""Signals of the fidelity gate: how much a reader can still tell of a compressed passage.

The reader answers questions made from the passage by rule, and repeats the passage, from the slots and from the text.
Targets are teacher-forced; logits exist at target positions only, in chunks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import check_counts
from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from .questions import find_spans, make_question

SIGNALS = ("probe_hits", "probe_recall", "probe_agreement", "fact_recall", "reconstruction")
FACTS = ("name", "date", "number", "title")
RARE = 3  # tokens of a rare word
_LOGITS = 2**25  # logits held at once (128 MiB in float32)

Measured = tuple[float | None, ...]


@dataclass(frozen=True)
class FidelityConfig:
    """What a gate measures. Higher signals mean that more survived; likelihoods are in nats per token.

    - ``probe_hits``: share of probe questions that the reader answers exactly from the slots.
    - ``probe_recall``: log-likelihood of the probes' answers from the slots minus that from the text.
    - ``probe_agreement``: minus KL(text || slots) of the next-token distributions over the probes' answers.
    - ``fact_recall``: log-likelihood of names, dates, numbers, titles and rare words in the repeated passage, from the slots
      minus that from the text.
    - ``reconstruction``: log-likelihood of the passage repeated from its slots.

    Attributes:
        signals: the measured signals; ``reconstruction`` alone is the cheapest.
        probes: questions per passage.
        repeat_tokens: maximal tokens of the repeated passage; probes cover all of it.
        question: text after the passage in a probe, with ``{question}``.
        repeat: the request to repeat the passage.
        chat: use the reader's chat template.
    """

    signals: tuple[str, ...] = SIGNALS
    probes: int = 6
    repeat_tokens: int = 256
    question: str = "\n\nQuestion: {question}\nAnswer:"
    repeat: str = "\nRepeat the passage:\n"
    chat: bool = False

    def __post_init__(self) -> None:
        check_counts(self, {"probes": 1, "repeat_tokens": 1})
        if isinstance(self.signals, str) or not self.signals or set(self.signals) - set(SIGNALS):
            raise ValueError(f"signals must be some of {', '.join(SIGNALS)}, got {self.signals!r}.")
        object.__setattr__(self, "signals", tuple(name for name in SIGNALS if name in self.signals))
        if "{question}" not in self.question or not self.repeat.strip():
            raise ValueError("question must contain {question}, and repeat must not be blank.")


class Prober:
    """Measures passages with a reader; see `FidelityGate.measure`."""

    def __init__(self, reader: Reader, config: FidelityConfig) -> None:
        self.reader = reader
        self.config = config

    @torch.no_grad()
    def measure(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], batch_size: int
    ) -> list[Measured | None]:
        """The signals of each passage."""
        items = [item for place, pair in enumerate(zip(passages, texts)) for item in self._items(place, *pair)]
        read: dict[int, tuple[list[_Read], list[tuple[_Item, _Read]]]] = {}
        for item, found in self._read(items, passages, texts, batch_size):
            probes, repeats = read.setdefault(item.place, ([], []))
            if item.facts is None:
                probes.append(found)
            else:
                repeats.append((item, found))
        return [self._signals(*read[place]) if place in read else None for place in range(len(passages))]

    def _items(self, place: int, passage: CompressedPassage, text: str) -> Iterator[_Item]:
        """The probes of a passage, and its repetition."""
        if not passage.slots or not text.strip():
            return
        lead = "" if self.config.chat else " "
        if any(name.startswith("probe") for name in self.config.signals):
            for question, answer in make_probes(text, self.config.probes):
                ids = self.reader.tokenize(lead + answer)
                tail = self.config.question.replace("{question}", question)
                yield from self._fitting(_Item(place, tail, ids, None), passage, text)
        if {"fact_recall", "reconstruction"} & set(self.config.signals):
            ids, offsets = self.reader.tokenize_with_offsets(text)
            facts = fact_tokens(text, offsets)
            n = self.config.repeat_tokens
            yield from self._fitting(_Item(place, self.config.repeat, ids[:n], facts[:n]), passage, text)

    def _fitting(self, item: _Item, passage: CompressedPassage, text: str) -> Iterator[_Item]:
        """The item if it fits the reader's positions; a repetition is shortened to fit."""
        limit = self.reader.max_positions
        if limit is not None:
            longest = max(self.reader.length([read, item.tail], chat=self.config.chat) for read in (passage, text))
            room = limit - longest
            if item.facts is None and room < len(item.ids):
                return
            if item.facts is not None:
                item = item._replace(ids=item.ids[: max(room, 0)], facts=item.facts[: max(room, 0)])
        if item.ids:
            yield item

    def _read(
        self, items: Sequence[_Item], passages: Sequence[CompressedPassage], texts: Sequence[str], batch_size: int
    ) -> Iterator[tuple[_Item, _Read]]:
        compare_facts = "fact_recall" in self.config.signals
        for compared in (True, False):
            kind = [item for item in items if (item.facts is None or compare_facts) == compared]
            kind.sort(key=lambda item: -(len(texts[item.place]) + len(item.tail)))
            for start in range(0, len(kind), batch_size):
                batch = kind[start : start + batch_size]
                ids = [item.ids for item in batch]
                slots = self._hidden([[passages[item.place], item.tail] for item in batch], ids)
                text = self._hidden([[texts[item.place], item.tail] for item in batch], ids) if compared else None
                flat = torch.tensor([i for target in ids for i in target], device=slots.device)
                sizes = [len(target) for target in ids]
                columns = [column.split(sizes) for column in _compare(self.reader, slots, text, flat)]
                yield from ((item, _Read(*parts)) for item, parts in zip(batch, zip(*columns)))

    def _hidden(self, prompts: list[Any], ids: list[list[int]]) -> Tensor:
        return self.reader.target_hidden(prompts, ids, chat=self.config.chat).hidden

    def _signals(self, probes: list[_Read], repeats: list[tuple[_Item, _Read]]) -> Measured:
        found: dict[str, float] = {}
        if probes:
            found["probe_hits"] = _mean([float(read.hits.all()) for read in probes])
            found["probe_recall"] = _mean([float((read.slots - read.text).mean()) for read in probes])
            found["probe_agreement"] = -_mean([max(float(read.kl.mean()), 0.0) for read in probes])
        for item, read in repeats:
            found["reconstruction"] = float(read.slots.mean())
            facts = torch.tensor(item.facts)
            if bool(facts.any()) and "fact_recall" in self.config.signals:
                found["fact_recall"] = float((read.slots - read.text)[facts].mean())
        return tuple(round(found[name], 6) if name in found else None for name in self.config.signals)


class _Item(NamedTuple):
    """The prompt (passage ``place`` and ``tail``) and its target ``ids``; ``facts`` marks tokens of a repetition."""

    place: int
    tail: str
    ids: list[int]
    facts: list[bool] | None


class _Read(NamedTuple):
    """Per target token: log-likelihoods from slots and text, greedy hits from slots, KL."""

    slots: Tensor
    text: Tensor
    hits: Tensor
    kl: Tensor


def make_probes(text: str, count: int) -> list[tuple[str, str]]:
    """Makes at most ``count`` pairs (question, answer) about a passage, deterministically.

    Names, dates, numbers and quoted titles come first, then other phrases.
    """
    rng = random.Random(text)
    spans = find_spans(text)
    rng.shuffle(spans)
    spans.sort(key=lambda span: span.kind not in FACTS)
    found: dict[str, str] = {}
    for span in spans:
        answer = text[span.start : span.end]
        if len(found) == count:
            break
        if answer not in found and (question := make_question(text, span, rng)):
            found[answer] = question
    return [(question, answer) for answer, question in found.items()]


def fact_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Marks the tokens of names, dates, numbers, titles and rare words."""
    facts = [(span.start, span.end) for span in find_spans(text) if span.kind in FACTS]
    marked = np.zeros(len(text) + 1, dtype=bool)
    for start, end in facts:
        marked[start:end] = True
    of_word: dict[int, list[int]] = {}
    word = np.cumsum([0, *(a.isspace() for a in text)])  # a word's number: the blanks before its end
    for place, (_, end) in enumerate(offsets):
        of_word.setdefault(int(word[end]), []).append(place)
    found = [bool(marked[start:end].any()) for start, end in offsets]
    for places in of_word.values():
        if len(places) >= RARE:
            for place in places:
                found[place] = True
    return found


def _compare(reader: Reader, slots: Tensor, text: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns of `_Read`, each ``[n]``, of hidden states ``[n, d]`` from slots and text; logits exist in chunks."""
    chunk = max(1, _LOGITS // reader.vocab_size)
    columns: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        wanted = ids[part, None]
        q = reader.head(slots[part]).float().log_softmax(-1)
        columns[0].append(q.gather(1, wanted)[:, 0])
        columns[2].append(q.argmax(-1) == ids[part])
        if text is not None:
            p = reader.head(text[part]).float().log_softmax(-1)
            columns[1].append(p.gather(1, wanted)[:, 0])
            columns[3].append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    none = torch.zeros(len(ids))
    a, b, c, d = (torch.cat(column).cpu() if column else none for column in columns)
    return a, b, c, d


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
