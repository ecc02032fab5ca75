"""Whether the reader reads: the gold passage moved among its distractors, and the answer replaced in the passages.

A reader that only looks at the first or last passage shows in `gold_positions`. In `answer_swap` a reader that answers from
memory keeps the old answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ..methods import Method, prompts
from ..rows import Row, clean
from .quality import Settings, answer_prompts, head, readable
from .scoring import score_each


@dataclass(frozen=True)
class Swap:
    """A record, and the same with another answer in its passages, now its only reference."""

    original: Record
    changed: Record


def gold_positions(
    reader: Reader,
    methods: Sequence[Method],
    records: Sequence[Record],
    settings: Settings,
    positions: Sequence[int] | None = None,
) -> list[Row]:
    """A row for each method and position of the gold passage (`test` = "gold-position"), default all positions.

    Only records with a gold passage and the most common number of passages count. Raises ValueError if there is none, or a
    position does not exist.
    """
    many = [record for record in records if record.gold is not None and len(record.passages) > 1]
    if not many:
        raise ValueError("No record has a gold passage among others; use a file with several passages a question.")
    sizes = [len(record.passages) for record in many]
    size = max(set(sizes), key=sizes.count)
    kept = readable(reader, [record for record in many if len(record.passages) == size], settings.max_new_tokens)
    places = list(range(size) if positions is None else positions)
    if wrong := [place for place in places if not 0 <= place < size]:
        raise ValueError(f"The gold passage cannot be put at {wrong}; these records have {size} passages.")
    rows = []
    for place in places:
        moved = [move_gold(record, place) for record in kept]
        for method, predictions in _answer(reader, methods, moved, settings, f"gold at {place}"):
            row = head(reader, method, moved, settings) | {"test": "gold-position", "position": place}
            rows.append(clean(row | _scores(predictions, moved)))
    return rows


def answer_swap(reader: Reader, methods: Sequence[Method], records: Sequence[Record], settings: Settings) -> list[Row]:
    """A row for each method (`test` = "answer-swap").

    `em` and `f1` count the new answer, `em_old` the old one, `em_before` is the score on the unchanged passages, `follows` the
    share of new answers among the `n_right` questions answered rightly before. Raises ValueError if nothing can be swapped.
    """
    swaps = swap_answers(readable(reader, records, settings.max_new_tokens), settings.seed)
    if not swaps:
        raise ValueError("No answer could be swapped: none stands in its passages as it is, or none is of like kind.")
    original, changed = [swap.original for swap in swaps], [swap.changed for swap in swaps]
    before = dict(_answer(reader, methods, original, settings, "answers as they are"))
    rows = []
    for method, predictions in _answer(reader, methods, changed, settings, "answers swapped"):
        was, follows = score_each(before[method], original)["em"], score_each(predictions, changed)["em"]
        right = was == 1
        row = head(reader, method, changed, settings) | {"test": "answer-swap"} | _scores(predictions, changed)
        row |= {"em_old": _scores(predictions, original)["em"], "em_before": float(was.mean())}
        row |= {"follows": float(follows[right].mean()) if right.any() else None, "n_right": int(right.sum())}
        rows.append(clean(row))
    return rows


def move_gold(record: Record, place: int) -> Record:
    """The record with its gold passage at `place`, the others in their own order."""
    if record.gold is None:
        raise ValueError(f"Record {record.id or record.question!r} has no gold passage that could be moved.")
    order = [i for i in range(len(record.passages)) if i != record.gold]
    order.insert(place, record.gold)
    return replace(
        record,
        passages=tuple(record.passages[i] for i in order),
        titles=tuple(record.titles[i] for i in order),
        gold=place,
    )


def swap_answers(records: Sequence[Record], seed: int = 0) -> list[Swap]:
    """Replace each record's answer in its passages by another record's answer of the same kind and length.

    Of several reference answers the shortest in the passages is replaced. Records without one, with the answer in the
    question, or without another answer of that kind are left out.
    """
    rng = random.Random(seed)
    pool: dict[tuple[str, int], set[str]] = {}
    for record in records:
        for answer in record.answers:
            pool.setdefault(_kind(answer), set()).add(answer)
    swaps = []
    for record in records:
        everything = " ".join([record.question, *record.passages])
        present = [answer for answer in record.answers if any(_whole(answer).search(p) for p in record.passages)]
        old = min(present, key=len, default=None)
        if old is None or _whole(old).search(record.question):
            continue
        choices = sorted(answer for answer in pool[_kind(old)] if answer.lower() not in everything.lower())
        if choices:
            new = rng.choice(choices)
            literal = new.replace("\\", r"\\")
            passages = tuple(_whole(old).sub(literal, passage) for passage in record.passages)
            swaps.append(Swap(record, replace(record, passages=passages, answers=(new,))))
    return swaps


def _kind(answer: str) -> tuple[str, int]:
    """Rough kind of an answer, and its number of words."""
    words = answer.split()
    if re.fullmatch(r"\d{4}", answer):
        kind = "year"
    elif any(character.isdigit() for character in answer):
        kind = "number"
    elif all(word[:1].isupper() for word in words if len(word) > 3):
        kind = "name"
    else:
        kind = "phrase"
    return kind, len(words)


def _whole(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)


def _answer(
    reader: Reader, methods: Sequence[Method], records: Sequence[Record], settings: Settings, title: str
) -> list[tuple[Method, list[str]]]:
    def answer(method: Method) -> list[str]:
        asked = prompts(method, reader, records)
        return answer_prompts(method.reads(reader), asked, settings, f"{title}: {method.name}")

    return [(method, answer(method)) for method in methods]


def _scores(predictions: Sequence[str], records: Sequence[Record]) -> Row:
    return {name: float(scores.mean()) for name, scores in score_each(predictions, records).items()}
