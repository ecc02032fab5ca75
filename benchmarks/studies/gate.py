"""The gate suite: which passages to send as text, against sending as many at random and against slots alone.

A gate is calibrated on the questions of one half and judged on the other. There, for each share of passages sent as text,
the reader answers all questions from the mix that the gate chooses and from mixes drawn at random that take as many reader
tokens; the difference of F1 is paired by question.
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
from ..methods import Compressed
from ..quality.quality import Settings, readable
from ..rows import Row, clean, provenance
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
    """A gate fitted on questions about single passages: each record's gold one, or its only one.

    A passage's target is one less what its questions lose, in the mean, when it is read compressed.

    Args:
        method: the compressor, and the ratio.
        records: dev data.
        settings: batch size, longest answer.
        config: what the gate measures.
        by: what is lost: ``"f1"`` of the answers, or ``"probability"`` of the reference answer (of a token, in the mean),
            which tells more about a weak reader, whose answers are often wrong either way.
        priced: passages that cost little as text come before others that lose as much.

    Raises:
        ValueError: if too few records have a passage that is known to hold the answer, or ``by`` is neither.
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
    """The curve from the share of passages sent as text to F1 and reader tokens.

    Rows carry ``sending``: ``none`` (no context), ``slots``, ``text``, ``gate`` and ``random``, and ``level``: the share asked
    for, a name that `FidelityGate.threshold` takes, ``curve`` (the mean over all shares asked for), or ``budget-of-R`` (as
    many reader tokens as the compressor alone takes at a lower ratio R). Beside each of the gate's stand ``random`` and
    ``shortest``: the passages that cost least as text, up to as many reader tokens, whatever they lost.

    Args:
        gate: calibrated on other questions.
        method: the compressor and the ratio that the gate was calibrated with.
        records: the questions to report on.
        settings: dataset, batch size, seed of the bootstrap.
        shares: of passages sent as text.
        seeds: random sendings for each of the gate's.
        slots_alone: the same compressor at lower ratios.

    Raises:
        ValueError: if a share is not between 0 and 1, or ``seeds`` is below 1.
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
    drawn = {
        name: [mixture.at_random(sent, f"{settings.seed}/{name}/{i}") for i in range(seeds)]
        for name, sent in sendings.items()
    }
    short = sorted(texts, key=lambda text: (mixture.saved[text], text))
    shortest = {
        name: mixture.within(sum(mixture.extra[text] for text in sent), short, skip=True)
        for name, sent in sendings.items()
    }
    # All of them in common batches.
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
        mean = np.mean(differences, axis=0)
        low, high = clustered_interval(mean, [record.passages for record in kept], settings.seed)
        summary = {"f1_minus_random": float(mean.mean()), "f1_minus_random_low": low, "f1_minus_random_high": high}
        rows.append(
            report.about("gate")
            | {"level": "curve", "seeds": seeds}
            | summary
            | _ranking(gate, mixture, scores, measured)
        )
    return [clean(row) for row in rows]


@dataclass(frozen=True)
class _Report:
    """What all rows share, and how a reading becomes one."""

    mixture: Mixture
    none: Reading
    settings: Settings
    skipped: int

    def about(self, sending: str) -> Row:
        records, method = self.mixture.records, self.mixture.method
        return {
            "suite": "quality",
            "test": "gate",
            "dataset": self.settings.dataset,
            "passages": round(float(np.mean([len(record.passages) for record in records])), 2),
            "method": "none" if sending == "none" else method.name,
            "ratio_asked": None if sending == "none" else method.ratio,
            "sending": sending,
            "n": len(records),
            "skipped": self.skipped,
            "max_new_tokens": self.settings.max_new_tokens,
            **provenance(self.mixture.reader, self.settings.seed, method.compressor),
        }

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
        paired = chosen.f1 - other.f1
        groups = [record.passages for record in self.mixture.records]
        low, high = clustered_interval(paired, groups, self.settings.seed)
        return {
            f"{name}_f1": float(other.f1.mean()),
            f"{name}_reader_tokens": float(other.tokens.mean()),
            f"f1_minus_{name}": float(paired.mean()),
            f"f1_minus_{name}_low": low,
            f"f1_minus_{name}_high": high,
        }


def _single(record: Record) -> Record:
    text = record.passages[0] if record.gold is None else record.gold_text
    return replace(record, passages=(text,), titles=("",), gold=0)


def _kept(mixture: Mixture, by: str = "f1") -> dict[str, float]:
    """For each passage of records with one each: one less what its questions lose by reading it compressed."""
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
    """How well score and signals tell passages that lost answers from the others, where each record has one passage."""
    if any(len(record.passages) != 1 for record in mixture.records):
        return {}
    kept = _kept(mixture)
    texts = list(mixture.passages)
    lost = np.array([kept[text] < 1 for text in texts])
    row: Row = {"auc": auc(np.array([scores[text] for text in texts]), lost), "lost_share": float(lost.mean())}
    for place, name in enumerate(gate.signals):
        found = {i: value for i, values in enumerate(measured) if values and (value := values[place]) is not None}
        row[f"auc_{name}"] = auc(np.array(list(found.values())), lost[list(found)]) if found else None
    predicted, truth = np.array([scores[text] for text in texts]), np.array([kept[text] for text in texts])
    counts = np.array([mixture.counts[text] for text in texts], dtype=float)
    row["brier"] = float(np.average((predicted - truth) ** 2, weights=counts))
    row["brier_constant"] = float(np.average((np.average(truth, weights=counts) - truth) ** 2, weights=counts))
    return row


def clustered_interval(
    values: np.ndarray, groups: Sequence[Hashable], seed: int, *, repeats: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, whole groups resampled.

    Questions about the same passages are sent together, so that they are no independent draws.
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of = np.array([places[group] for group in groups])
    sums, sizes = np.bincount(of, weights=values), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (repeats, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auc(values: np.ndarray, lost: np.ndarray) -> float | None:
    """The chance that a passage that lost nothing has a higher value than one that did; ties count half; None without both."""
    good, bad = values[~lost], values[lost]
    if not len(good) or not len(bad):
        return None
    return float(np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)))


def gate_line(row: Row) -> str:
    """A row in one line of the terminal."""
    name = f"{row['method']} {row.get('ratio_asked') or 0:g}x" if row.get("ratio_asked") else str(row["method"])
    parts = [f"{name:20}", f"{row['sending']:7}", f"{row.get('level', ''):14}"]
    if "share" in row:
        parts.append(f"as text {100 * row['share']:5.1f} %")
    if "f1" in row:
        parts.append(f"tokens {row['reader_tokens']:6.1f}  F1 {100 * row['f1']:5.1f}")
    for other in ("random", "shortest", "slots"):
        if f"f1_minus_{other}" in row:
            low, high = (100 * row[f"f1_minus_{other}_{end}"] for end in ("low", "high"))
            parts.append(f"F1 - {other} {100 * row[f'f1_minus_{other}']:+5.2f} ({low:+.2f} to {high:+.2f})")
    if "auc" in row:
        parts.append(
            "AUC " + ", ".join(f"{k.removeprefix('auc_')} {v:.2f}" for k, v in row.items() if k.startswith("auc"))
        )
    return "  ".join(parts)
