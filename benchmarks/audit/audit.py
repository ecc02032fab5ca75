"""Runs attackers on what is stored and scores what they read."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...compressors.encoders.embedder import Embedder
from ..rows import Row
from .attacker import Attacker
from .corpus_statistics import CorpusStatistics
from .scores import summary, words
from .targets import Target


@dataclass
class Outcome:
    """What one attacker read of one target: the row of the results file, and the reconstructions, paired with the texts."""

    row: Row
    target: Target
    guesses: list[str] = field(repr=False)

    @property
    def label(self) -> str:
        """Target and attacker, for headings."""
        return f"{self.target.label}: {self.row['attacker']}"


def baseline(target: Target, statistics: CorpusStatistics, embedder: Embedder | None = None, seed: int = 0) -> Outcome:
    """What is guessed of the target's texts without looking at what is stored."""
    guesses = [statistics.guess(len(words(text))) for text in target.texts]
    row: Row = {"method": "none", "attacker": statistics.name, **summary(target.texts, guesses, embedder, seed)}
    return Outcome(row, target, guesses)


def audit(target: Target, attacker: Attacker, embedder: Embedder | None = None, seed: int = 0) -> Outcome:
    """Attacks a target.

    The row also holds, as `<score>_other`, the scores against the text of another passage: what the attacker writes whatever
    is stored.

    Raises:
        ValueError: if the attacker does not apply to the target, or lost a passage.
    """
    if not all(attacker.reads(one) for one in target.stolen):
        raise ValueError(f"The attacker {attacker.name} cannot read {target.interface} ({target.label}).")
    start = time.perf_counter()
    guesses = attacker.attack(target.stolen)
    spent = time.perf_counter() - start
    row: Row = {
        "method": target.name,
        "compressor": target.made_by or None,
        "ratio_asked": target.ratio,
        "interface": target.interface,
        "defence": target.defence,
        "attacker": attacker.name,
        "slots": target.slots,
        "bytes_per_passage": None if target.defence else target.nbytes,  # here all tensors have their first dtype
        "attack_seconds_per_passage": spent / len(guesses),
        **attacker.about,
        **summary(target.texts, guesses, embedder, seed),
    }
    if len(guesses) > 1:
        other = summary(strangers(target.texts, seed), guesses)
        row |= {f"{name}_other": other[name] for name in ("recall", "token_f1", "names") if name in other}
    return Outcome(row, target, guesses)


def strangers(texts: Sequence[str], seed: int = 0) -> list[str]:
    """For each text another one, by a random cycle through all of them."""
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    after = dict(zip(order, [*order[1:], *order[:1]]))
    return [texts[after[i]] for i in range(len(texts))]


def sentence(outcome: Outcome, without: Outcome | None = None) -> str:
    """What the outcome means, in a sentence, next to the guess of the corpus's statistics."""
    row, target = outcome.row, outcome.target
    what = {"vector": "these retrieval vectors", "kv": "these keys and values", "embeds": "these slots"}
    said = f"Someone who copies {what.get(target.interface, 'this text')} ({target.label}) reads {_shares(row)}"
    if without is not None:
        said += f"; a guess from the corpus's statistics alone gets {_shares(without.row)}"
    return said + "."


def _shares(row: Row) -> str:
    parts = [
        f"{100 * row[key]:.0f} % of the {noun}" for key, noun in (("recall", "words"), ("names", "names")) if key in row
    ]
    return " and ".join(parts)


def worst(outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
    """Of each target the outcome that reads most words."""
    best: dict[str, Outcome] = {}
    for outcome in outcomes:
        have = best.get(outcome.target.label)
        if have is None or outcome.row["recall"] > have.row["recall"]:
            best[outcome.target.label] = outcome
    yield from best.values()
