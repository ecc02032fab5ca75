"""Signals of the fidelity gate: how much a reader can still tell of a compressed passage.

The reader answers questions made from the passage by rule, and repeats the passage, from the slots and from the text.
Targets are teacher-forced; logits exist at target positions only, in chunks.
"""

from __future__ import annotations

import random
import sys
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
from .questions import ASKED, REPEAT, find_spans, make_question

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
    question: str = ASKED
    repeat: str = REPEAT
    chat: bool = False

    def __post_init__(self) -> None:
        check_counts(self, {"probes": 1, "repeat_tokens": 1})
        if isinstance(self.signals, str) or not self.signals or set(self.signals) - set(SIGNALS):
            raise ValueError(f"signals must be some of {', '.join(SIGNALS)}, got {self.signals!r}.")
        object.__setattr__(self, "signals", tuple(name for name in SIGNALS if name in self.signals))
        if "{question}" not in self.question or not self.repeat.strip():
            raise ValueError("question must contain {question}, and repeat must not be blank.")


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


@torch.no_grad()
def measure(
    reader: Reader,
    config: FidelityConfig,
    passages: Sequence[CompressedPassage],
    texts: Sequence[str],
    batch_size: int,
) -> list[Measured | None]:
    """The signals of each passage; see `FidelityGate.measure`."""
    items = [item for place, pair in enumerate(zip(passages, texts)) for item in _items(reader, config, place, *pair)]
    read: dict[int, list[tuple[_Item, _Read]]] = {}
    for compared in (True, False):  # a reconstruction alone needs no pass over the text
        kind = [i for i in items if (i.facts is None or "fact_recall" in config.signals) == compared]
        kind.sort(key=lambda item: -(len(texts[item.place]) + len(item.tail)))
        for start in range(0, len(kind), batch_size):
            batch = kind[start : start + batch_size]
            slots = _hidden(reader, config, batch, passages)
            text = _hidden(reader, config, batch, texts) if compared else None
            ids = torch.tensor([i for item in batch for i in item.ids], device=slots.device)
            parts = zip(*(c.split([len(item.ids) for item in batch]) for c in _compare(reader, slots, text, ids)))
            for item, part in zip(batch, parts):
                read.setdefault(item.place, []).append((item, _Read(*part)))
    return [_signals(config, read[place]) if place in read else None for place in range(len(passages))]


def _items(
    reader: Reader, config: FidelityConfig, place: int, passage: CompressedPassage, text: str
) -> Iterator[_Item]:
    """The probes of a passage and its repetition, as far as they fit the reader's positions."""
    if not passage.slots or not text.strip():
        return

    def room(tail: str) -> int:
        if reader.max_positions is None:
            return sys.maxsize
        longest = max(reader.length([source, tail], chat=config.chat) for source in (passage, text))
        return max(reader.max_positions - longest, 0)

    if any(name.startswith("probe") for name in config.signals):
        for question, answer in make_probes(text, config.probes):
            ids = reader.tokenize(("" if config.chat else " ") + answer)
            tail = config.question.replace("{question}", question)
            if ids and len(ids) <= room(tail):
                yield _Item(place, tail, ids, None)
    if {"fact_recall", "reconstruction"} & set(config.signals):
        ids, offsets = reader.tokenize_with_offsets(text)
        facts = fact_tokens(text, offsets)
        if n := min(config.repeat_tokens, room(config.repeat)):
            yield _Item(place, config.repeat, ids[:n], facts[:n])


def _hidden(reader: Reader, config: FidelityConfig, batch: Sequence[_Item], sources: Sequence[Any]) -> Tensor:
    prompts = [[sources[item.place], item.tail] for item in batch]
    return reader.target_hidden(prompts, [item.ids for item in batch], chat=config.chat).hidden


def _signals(config: FidelityConfig, found: Sequence[tuple[_Item, _Read]]) -> Measured:
    values: dict[str, float] = {}
    if probes := [read for item, read in found if item.facts is None]:
        values["probe_hits"] = _mean([float(read.hits.all()) for read in probes])
        values["probe_recall"] = _mean([float((read.slots - read.text).mean()) for read in probes])
        values["probe_agreement"] = -_mean([max(float(read.kl.mean()), 0.0) for read in probes])
    for item, read in found:
        if item.facts is not None:
            values["reconstruction"] = float(read.slots.mean())
            facts = torch.tensor(item.facts)
            if bool(facts.any()) and "fact_recall" in config.signals:
                values["fact_recall"] = float((read.slots - read.text)[facts].mean())
    return tuple(round(values[name], 6) if name in values else None for name in config.signals)


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
