"""How many passages stand before a question: distractors cut, or topped up with passages of other questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..recipes.data.corpus import Record
from .metrics import containment


def with_passages(records: Sequence[Record], n: int, *, pool: Sequence[Record] = (), seed: int = 0) -> list[Record]:
    """The records with `n` passages each: the gold one and n - 1 distractors, in random order.

    A record's own distractors are drawn first; where they are too few, passages of other records that hold none of its
    answers. What a record gets depends on itself, `pool` and `seed` alone, and not on the other records.

    Args:
        n: passages a record.
        pool: records whose passages top up; default `records`.
        seed: of the draw.

    Raises:
        ValueError: if n is less than 1, or there are not enough passages without the answer.
    """
    if n < 1:
        raise ValueError(f"A question needs at least one passage, got {n}.")
    # title by text: a passage that several records share is one passage
    titles = {text: title for record in (pool or records) for text, title in zip(record.passages, record.titles)}
    texts = list(titles)
    return [
        _redrawn(record, n, texts, titles, random.Random(f"{seed}/{record.id or record.question}"))
        for record in records
    ]


def _redrawn(record: Record, n: int, texts: Sequence[str], titles: dict[str, str], rng: random.Random) -> Record:
    gold = [] if record.gold is None else [record.gold]
    others = [i for i in range(len(record.passages)) if i != record.gold]
    kept = [*gold, *rng.sample(others, min(len(others), n - len(gold)))]
    chosen = [(record.passages[i], record.titles[i]) for i in kept]
    own = set(record.passages)
    for k in rng.sample(range(len(texts)), len(texts)) if len(chosen) < n else ():
        if texts[k] not in own and not containment(texts[k], record.answers):
            chosen.append((texts[k], titles[texts[k]]))
            if len(chosen) == n:
                break
    if len(chosen) < n:
        raise ValueError(
            f"Question {record.id or record.question!r} finds only {len(chosen)} of {n} passages: all others hold its answer "
            "or are its own. Ask for fewer passages, or give a file with more."
        )
    order = rng.sample(range(n), n)
    passages, names = zip(*(chosen[i] for i in order))
    return replace(record, passages=passages, titles=names, gold=None if record.gold is None else order.index(0))
