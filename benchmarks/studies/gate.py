"""The gate suite: passages sent as text by a fidelity gate, vs. random choices and vs. slots alone.

A gate is calibrated on the questions of one half and judged on the other: at each share of passages sent as text against
random choices that take as many reader tokens, paired by question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...compressors import CompressedPassage, FidelityConfig, FidelityGate
from ...compressors.fidelity.gate import LEVELS
from ...compressors.fidelity.probes import Measured
from ...recipes.data.corpus import Record
from .. import metrics
from ..methods import Compressed, Method, NoContext
from ..quality.quality import Settings, head, readable
from ..rows import Row, clean
from .mixture import Mixture, Reading, Sent, mean_reading

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def calibrate(
    method: Compressed,
    records: Sequence[Record],
    settings: Settings,
    config: FidelityConfig | None = None,
    by: str = "f1",
    priced: bool = True,
) -> FidelityGate:
    """Fit a gate on questions about single passages: each record's gold one, or its only one.

    A passage's target is 1 minus the mean loss of its questions when it is read compressed.

    Args:
        config: What the gate measures.
        by: The loss: `"f1"` of the answers, or `"probability"` of the reference answer (mean per token), which tells more about
            a weak reader.
        priced: Put passages that cost little as text before others that lose as much.

    Raises:
        ValueError: If no record has a passage that is known to hold the answer, or for another `by`.
    """
    if by not in ("f1", "probability"):
        raise ValueError(f"A gate is calibrated by f1 or by probability, got {by!r}.")
    singles = [_single(record) for record in records if record.gold is not None or len(record.passages) == 1]
    if not singles:
        raise ValueError("A gate is calibrated on questions whose gold passage is known, and none of these has one.")
    mixture = Mixture(method, readable(method.compressor.reader, singles, settings.max_new_tokens), settings)
    kept = _kept(mixture, by)
    texts = list(kept)
    gate = FidelityGate(method.compressor, config)
    measured = _measure(gate, mixture, texts)
    saved = [mixture.saved[text] for text in texts] if priced else None
    return gate.fit(measured, [kept[t] for t in texts], [mixture.counts[t] for t in texts], saved=saved)


def gate_rows(
    gate: FidelityGate,
    method: Compressed,
    records: Sequence[Record],
    settings: Settings,
    *,
    shares: Sequence[float] = SHARES,
    seeds: int = 20,
    slots_alone: Sequence[Compressed] = (),
) -> list[Row]:
    """F1 and reader tokens against the share of passages sent as text.

    Rows carry `sending`: `none` (no context), `slots`, `text`, `gate`, `random` (mean over `seeds` draws) or `shortest` (the
    passages that are cheapest as text), the last two at the gate's reader tokens; and `level`: the share asked for, a name
    that `FidelityGate.threshold` takes, `curve` (mean over all shares), or `budget-of-R` (the reader tokens of the compressor
    alone at a lower ratio R, one of `slots_alone`).

    Raises:
        ValueError: If a share is not between 0 and 1, or `seeds` is below 1.
    """
    if bad := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"Shares sent as text lie between 0 and 1, got {bad}.")
    if seeds < 1:
        raise ValueError(f"Random sending needs at least one seed, got {seeds}.")
    kept = readable(method.compressor.reader, records, settings.max_new_tokens)
    mixture = Mixture(method, kept, settings)
    texts = list(mixture.passages)
    measured = _measure(gate, mixture, texts)
    scores = dict(zip(texts, gate.scores_of(measured, [mixture.saved[text] for text in texts])))
    order = sorted(texts, key=lambda text: (scores[text], text))
    report = _Report(mixture, _no_context(mixture), settings, len(records) - len(kept))

    sendings: dict[str, Sent] = {f"{share:g}": mixture.first(share, order) for share in shares}
    sendings |= {name: frozenset(t for t in texts if scores[t] < gate.threshold(name)) for name in LEVELS}
    alone = {f"budget-of-{other.ratio:g}": Mixture(other, kept, settings).read([()])[0] for other in slots_alone}
    slots, full = mixture.read([(), texts])
    for name, other in alone.items():
        sendings[name] = mixture.within(float((other.tokens - slots.tokens).sum()), order, skip=False)
    seeded = [(name, [f"{settings.seed}/{name}/{i}" for i in range(seeds)]) for name in sendings]
    drawn = {name: [mixture.at_random(sendings[name], seed) for seed in each] for name, each in seeded}
    short = sorted(texts, key=lambda text: (mixture.saved[text], text))
    spent = {name: sum(mixture.extra[text] for text in sent) for name, sent in sendings.items()}
    shortest = {name: mixture.within(budget, short, skip=True) for name, budget in spent.items()}
    # all in common batches
    mixture.read([*sendings.values(), *shortest.values(), *(sent for some in drawn.values() for sent in some)])

    rows = [
        report.row("none", report.none),
        report.row("slots", slots, (), full),
        report.row("text", full, texts, full),
    ]
    differences = []
    for name, sent in sendings.items():
        chosen, by_chance = mixture.read([sent])[0], mean_reading(mixture.read(drawn[name]))
        row = report.row("gate", chosen, sent, full) | {"level": name}
        row["threshold"] = max((scores[t] for t in sent), default=None)
        row |= report.difference("random", chosen, by_chance) | {"seeds": seeds}
        cheapest = mixture.read([shortest[name]])[0]
        row |= report.difference("shortest", chosen, cheapest)
        if name in alone:
            row |= report.difference("slots", chosen, alone[name])
        elif name not in LEVELS:
            differences.append(chosen.f1 - by_chance.f1)
        rows.append(row)
        share = float(np.mean([mixture.share(some) for some in drawn[name]]))
        rows.append(report.row("random", by_chance, (), full) | {"level": name, "share": share, "seeds": seeds})
        rows.append(report.row("shortest", cheapest, shortest[name], full) | {"level": name})
    if differences:
        summary = report.interval("f1_minus_random", np.mean(differences, axis=0))
        ranking = _ranking(gate, mixture, scores, measured)
        rows.append(report.about("gate") | {"level": "curve", "seeds": seeds} | summary | ranking)
    return [clean(row) for row in rows]


@dataclass(frozen=True)
class _Report:
    """Rows of readings."""

    mixture: Mixture
    none: Reading
    settings: Settings
    skipped: int

    def about(self, sending: str) -> Row:
        mixture, settings = self.mixture, self.settings
        method: Method = NoContext() if sending == "none" else mixture.method
        about = {"test": "gate", "sending": sending, "skipped": self.skipped, "max_new_tokens": settings.max_new_tokens}
        row = head(mixture.reader, method, mixture.records, settings) | about
        return row | {"compressor": mixture.method.compressor.fingerprint}

    def row(
        self, sending: str, found: Reading, sent: Collection[str] | None = None, full: Reading | None = None
    ) -> Row:
        row = self.about(sending) | {
            "share": None if sent is None else self.mixture.share(sent),
            "reader_tokens": float(found.tokens.mean()),
            **{name: float(getattr(found, name).mean()) for name in ("em", "f1", "containment")},
        }
        row["f1_ci_low"], row["f1_ci_high"] = metrics.bootstrap_mean(found.f1, seed=self.settings.seed)
        if full is not None:
            row |= metrics.recovered(found.f1, self.none.f1, full.f1, seed=self.settings.seed)
        return row

    def difference(self, name: str, chosen: Reading, other: Reading) -> Row:
        interval = self.interval(f"f1_minus_{name}", chosen.f1 - other.f1)
        return {f"{name}_f1": float(other.f1.mean()), f"{name}_reader_tokens": float(other.tokens.mean())} | interval

    def interval(self, key: str, values: np.ndarray) -> Row:
        groups = [record.passages for record in self.mixture.records]
        low, high = clustered_interval(values, groups, self.settings.seed)
        return {key: float(values.mean()), f"{key}_low": low, f"{key}_high": high}


def _single(record: Record) -> Record:
    text = record.passages[0] if record.gold is None else record.gold_text
    return replace(record, passages=(text,), titles=("",), gold=0)


def _kept(mixture: Mixture, by: str = "f1") -> dict[str, float]:
    """For records with one passage each: per passage, 1 minus the mean loss of its questions when it is read compressed."""
    if by == "f1":
        slots, full = (reading.f1 for reading in mixture.read([(), list(mixture.passages)]))
    else:
        slots, full = mixture.probabilities(()), mixture.probabilities(mixture.passages)
    losses: dict[str, list[float]] = defaultdict(list)
    for record, loss in zip(mixture.records, full - slots):
        losses[record.passages[0]].append(float(loss))
    return {text: 1.0 - max(float(np.mean(some)), 0.0) for text, some in losses.items()}


def _no_context(mixture: Mixture) -> Reading:
    bare = [replace(record, passages=(), titles=(), gold=None) for record in mixture.records]
    return Mixture(mixture.method, bare, mixture.settings).read([()])[0]


def _measure(gate: FidelityGate, mixture: Mixture, texts: Sequence[str]) -> list[Measured | None]:
    passages = [piece for text in texts if isinstance(piece := mixture.passages[text], CompressedPassage)]
    return gate.measure(passages, texts, batch_size=mixture.settings.batch_size)


def _ranking(
    gate: FidelityGate, mixture: Mixture, scores: Mapping[str, float], measured: Sequence[Measured | None]
) -> Row:
    """How well score and signals separate passages that lost answers, for records with one passage each."""
    if any(len(record.passages) != 1 for record in mixture.records):
        return {}
    kept = _kept(mixture)
    texts = list(mixture.passages)
    lost = np.array([kept[text] < 1 for text in texts])
    row: Row = {"auc": auc(np.array([scores[text] for text in texts]), lost), "lost_share": float(lost.mean())}
    for place, name in enumerate(gate.config.signals):
        found = {i: value for i, values in enumerate(measured) if values and (value := values[place]) is not None}
        row[f"auc_{name}"] = auc(np.array(list(found.values())), lost[list(found)]) if found else None
    predicted, truth = np.array([scores[text] for text in texts]), np.array([kept[text] for text in texts])
    counts = np.array([mixture.counts[text] for text in texts], dtype=float)
    row["brier"] = float(np.average((predicted - truth) ** 2, weights=counts))
    row["brier_constant"] = float(np.average((np.average(truth, weights=counts) - truth) ** 2, weights=counts))
    return row


def clustered_interval(values: np.ndarray, groups: Sequence[Hashable], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, resampling whole groups (questions about the same passages)."""
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of = np.array([places[group] for group in groups])
    sums, sizes = np.bincount(of, weights=values), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (2000, len(sums)))
    return metrics.interval(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))


def auc(values: np.ndarray, lost: np.ndarray) -> float | None:
    """Area under the ROC curve: chance that a passage without loss has a higher value than one with; None without both."""
    good, bad = values[~lost], values[lost]
    if not len(good) or not len(bad):
        return None
    return float(np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)))
