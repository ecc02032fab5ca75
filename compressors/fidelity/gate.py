"""The fidelity gate: did a passage survive its compression? Known when it is compressed, before anybody asks about it.

Some passages lose in compression what a question will ask for: a name, a number, a rare word. The gate lets the reader itself
say so. It asks questions made from the passage by rule and lets the passage be repeated, from the slots and from the text,
and compares (see `probes`). These signals are calibrated on dev data to "the answer from the slots is as
good as that from the text", and passages below a threshold are better read as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..base import CheckpointError, evaluating
from ..core.errors import ReaderMismatchError
from ..core.files import write_atomically
from ..core.fingerprint import hash_json
from ..core.passage import CompressedPassage
from .calibration import MonotoneLogistic, signal_rows, threshold_leaving
from .probes import FidelityConfig, Measured, Prober

if TYPE_CHECKING:
    from ..base import Compressor
    from ..reader.reader import Reader

LEVELS = {"low": 0.75, "medium": 0.5, "high": 0.25}  # share of the loss on dev data that may remain
FILE_NAME = "fidelity.json"
MARK = "fidelity"  # the key in a passage's info
_VERSION = 1

Fidelity = str | float


class FidelityGate:
    """Judges compressed passages: the probability that an answer from the slots is as good as one from the text.

    Args:
        compressor: made the passages; its reader reads both forms of them.
        config: what is measured.

    Attributes:
        compressor, config: as given.
        calibration: the map from signals to the probability, ``None`` before `fit`.
        thresholds: by the names ``"low"``, ``"medium"`` and ``"high"``.
        price: reader tokens that reading a passage compressed saves, the mean over the dev data; ``None``: not counted.

    Empty passages, and those whose text the reader has no room for, score 1: they are never sent as text.

    Example::

        gate = FidelityGate(compressor)
        gate.fit(gate.measure(compressor.compress(texts), texts), targets)
        gate.save_pretrained("gate")
        gate = FidelityGate.from_pretrained("gate", compressor)
        CompressedContextPostprocessor(compressor, fidelity="high", gate=gate)

    Raises:
        ValueError: if the compressor has no reader.
    """

    def __init__(self, compressor: Compressor, config: FidelityConfig | None = None) -> None:
        if compressor.reader is None:
            raise ValueError(f"A fidelity gate asks the reader, and this {type(compressor).__name__} has none.")
        self.compressor = compressor
        self.config = config or FidelityConfig()
        self.calibration: MonotoneLogistic | None = None
        self.thresholds: dict[str, float] = {}
        self.price: float | None = None
        self._made_for: tuple[str, str] | None = None
        self._fitted_on = 0

    @property
    def reader(self) -> Reader:
        """Who reads."""
        return self.compressor.reader

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals, in the order in which `measure` gives them."""
        return self.config.signals

    @property
    def measure_id(self) -> str:
        """What the marks in passages' ``info`` go by; another config measures anew, another calibration does not."""
        return hash_json("fidelity", _VERSION, asdict(self.config))

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], *, batch_size: int = 16
    ) -> list[Measured | None]:
        """The signals of passages, without gradients; what others stand in the batch changes nothing.

        Args:
            passages: made by the gate's compressor.
            texts: what they were made of, in order.
            batch_size: prompts read at a time; a passage has up to ``probes`` + 1.

        Returns:
            One number a signal for each passage, ``None`` for a signal that a passage has nothing to measure by; ``None``
            in place of all of them for a passage that is empty, or whose text the reader has no room for.

        Raises:
            ValueError: if the lists differ in length, or a passage is another compressor's.
        """
        if isinstance(texts, str) or len(passages) != len(texts):
            raise ValueError(f"Each passage needs the text it was made of: got {len(passages)} and {len(texts)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        made_by = self.compressor.fingerprint
        if bad := next((p.compressor for p in passages if p.compressor != made_by), None):
            raise ValueError(f"The gate judges passages of the compressor {made_by}, but one was made by {bad}.")
        with evaluating(self.compressor):
            return Prober(self.reader, self.config).measure(passages, texts, batch_size)

    def mark(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], *, batch_size: int = 16
    ) -> list[CompressedPassage]:
        """The passages with their signals in ``info["fidelity"]``; those that hold them already are returned as they are.

        Stores keep ``info``, so that a passage is measured once, when it is indexed. Arguments and errors: see `measure`.
        """
        if len(passages) != len(texts):
            raise ValueError(f"Each passage needs the text it was made of: got {len(passages)} and {len(texts)}.")
        marked = list(passages)
        new = [place for place, passage in enumerate(marked) if not self.is_marked(passage)]
        if new:
            found = self.measure([marked[i] for i in new], [texts[i] for i in new], batch_size=batch_size)
            for place, values in zip(new, found):
                mark = {"by": self.measure_id, "values": None if values is None else list(values)}
                marked[place] = replace(marked[place], info={**marked[place].info, MARK: mark})
        return marked

    def is_marked(self, passage: CompressedPassage) -> bool:
        """Whether a passage holds this gate's signals."""
        mark = passage.info.get(MARK)
        return isinstance(mark, Mapping) and mark.get("by") == self.measure_id

    # -- judging ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        measured: Sequence[Measured | None],
        targets: Sequence[float],
        weights: Sequence[float] | None = None,
        *,
        saved: Sequence[int] | None = None,
    ) -> FidelityGate:
        """Calibrates the gate on dev data, and sets its thresholds.

        With ``saved`` the gate also goes by what a passage costs as text: its score becomes 1 - (1 - p) * (mean tokens
        saved) / (tokens saved), so that those come first which lose most for each token that reading them compressed saves.

        Args:
            measured: what `measure` gave; passages without signals are left out.
            targets: for each passage, how good answers from its slots are against those from its text, in [0, 1]: one less
                the loss of F1, say, the mean over its questions.
            weights: how much each passage counts (its number of questions); default: all the same.
            saved: each passage's tokens less its slots.

        Returns:
            Itself.

        Raises:
            ValueError: if the lists differ in length, or there are too few passages.
        """
        counts = [1.0] * len(measured) if weights is None else list(weights)
        spared = [1] * len(measured) if saved is None else list(saved)
        if not len(measured) == len(targets) == len(counts) == len(spared):
            raise ValueError(
                "Calibration needs a target (a weight, and tokens saved) for each measured passage, got "
                f"{len(measured)} passages, {len(targets)} targets, {len(counts)} weights and {len(spared)} numbers of tokens."
            )
        there = [i for i, values in enumerate(measured) if values is not None]
        rows = signal_rows([measured[i] for i in there], len(self.signals))  # type: ignore[misc]
        good, count = np.array([targets[i] for i in there], dtype=float), np.array([counts[i] for i in there])
        self.calibration = MonotoneLogistic.fit(rows, good, count)
        self._made_for = (self.compressor.fingerprint, self.reader.fingerprint)
        self._fitted_on = len(there)
        spared = [max(spared[i], 1) for i in there]
        self.price = None if saved is None else float(np.average(spared, weights=count))
        scores = self._priced(self.calibration(rows), spared)
        self.thresholds = {name: threshold_leaving(scores, (1 - good) * count, left) for name, left in LEVELS.items()}
        return self

    def check_fits(self, compressor: Compressor) -> None:
        """Raises ``ValueError`` unless the gate is calibrated, for this compressor as it is now and its reader."""
        if self.calibration is None or self._made_for is None:
            raise ValueError("The gate is not calibrated: call fit with dev data, or load one with from_pretrained.")
        now = (compressor.fingerprint, None if compressor.reader is None else compressor.reader.fingerprint)
        for what, wanted, got in zip(("compressor", "reader"), self._made_for, now):
            if wanted != got:
                raise ReaderMismatchError(
                    f"The gate was calibrated for the {what} {wanted}, but this one is {got}; calibrate a gate for it: "
                    "nutgraf bench gate FILE --compressor NAME --save FOLDER."
                )

    def scores_of(self, measured: Sequence[Measured | None], saved: Sequence[int] | None = None) -> list[float]:
        """Scores of measured passages, in order.

        Args:
            measured: what `measure` gave.
            saved: each passage's tokens less its slots; needed by a gate that was fitted with them.

        Raises:
            ValueError: if the gate is not fitted, or ``saved`` is missing or of another length.
        """
        self.check_fits(self.compressor)
        if self.price is not None and (saved is None or len(saved) != len(measured)):
            raise ValueError("This gate counts what passages cost as text: give saved, the tokens less slots of each.")
        there = [i for i, values in enumerate(measured) if values is not None]
        scores = [1.0] * len(measured)
        if there:
            rows = signal_rows([measured[i] for i in there], len(self.signals))  # type: ignore[misc]
            spared = [1 if saved is None else max(saved[i], 1) for i in there]
            for place, score in zip(there, self._priced(self.calibration(rows), spared).tolist()):  # type: ignore[misc]
                scores[place] = score
        return scores

    def _priced(self, probabilities: np.ndarray, saved: Sequence[int]) -> np.ndarray:
        if self.price is None:
            return probabilities
        return 1 - (1 - probabilities) * self.price / np.array(saved, dtype=float)

    def scores(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], *, batch_size: int = 16
    ) -> list[float]:
        """How safe passages are to read compressed, in order; of a gate without a price, the probability that answers from
        the slots are as good as those from the text. Lower scores are sent as text first.

        Marked passages are not measured again. Arguments and errors: see `measure`.
        """
        marked = self.mark(passages, texts, batch_size=batch_size)
        return self.scores_of([_marked(p) for p in marked], [p.source_tokens - p.slots for p in marked])

    def threshold(self, fidelity: Fidelity) -> float:
        """The score below which a passage is to be read as text.

        Args:
            fidelity: ``"low"``, ``"medium"`` or ``"high"``: on the dev data, what passages lost that are still read
                compressed was at most 75, 50 or 25 % of what all of them lost; or the score itself, in (0, 1).

        Raises:
            ValueError: for anything else, or a name if the gate is not fitted.
        """
        if isinstance(fidelity, str) and fidelity in LEVELS:
            if not self.thresholds:
                raise ValueError(
                    "The gate is not calibrated: call fit with dev data, or load one with from_pretrained."
                )
            return self.thresholds[fidelity]
        if isinstance(fidelity, int | float) and not isinstance(fidelity, bool) and 0 < fidelity < 1:
            return float(fidelity)
        raise ValueError(f"fidelity must be low, medium, high or a number between 0 and 1, got {fidelity!r}.")

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``fidelity.json``; the folder may be the compressor's own. Raises ``ValueError`` if it is not fitted."""
        if self.calibration is None or self._made_for is None:
            raise ValueError("Only a calibrated gate can be saved; call fit first.")
        about = {
            "version": _VERSION,
            "compressor": self._made_for[0],
            "reader": self._made_for[1],
            "config": asdict(self.config),
            "calibration": self.calibration.to_dict(),
            "thresholds": self.thresholds,
            "price": self.price,
            "passages": self._fitted_on,
        }
        write_atomically(Path(folder) / FILE_NAME, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, compressor: Compressor) -> FidelityGate:
        """Loads what `save_pretrained` wrote, for the compressor and the reader it was calibrated for.

        Raises:
            CheckpointError: if the file is missing or damaged.
            ReaderMismatchError: if the gate was calibrated for another compressor or reader.
        """
        path = Path(folder) / FILE_NAME
        try:
            about = json.loads(path.read_text())
            if about["version"] != _VERSION:
                raise CheckpointError(f"{path} has version {about['version']!r}; this one reads {_VERSION}.")
            known = {field.name for field in fields(FidelityConfig)}
            if unknown := sorted(set(about["config"]) - known):
                raise CheckpointError(f"{path} has settings that are not known: {unknown}.")
            config = FidelityConfig(**{**about["config"], "signals": tuple(about["config"]["signals"])})
            calibration = MonotoneLogistic.from_dict(about["calibration"])
            thresholds = {name: float(about["thresholds"][name]) for name in LEVELS}
            price = None if about.get("price") is None else float(about["price"])
            if price is not None and not 0 < price < float("inf"):
                raise ValueError(f"its price must be a positive number, got {price!r}")
            made_for = (str(about["compressor"]), str(about["reader"]))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no readable fidelity gate: {error!r}.") from error
        gate = cls(compressor, config)
        if len(calibration.weights) != len(config.signals):
            raise CheckpointError(f"{path} holds another number of weights than of signals.")
        gate.calibration, gate.thresholds, gate.price, gate._made_for = calibration, thresholds, price, made_for
        gate._fitted_on = int(about.get("passages", 0))
        gate.check_fits(compressor)
        return gate


def _marked(passage: CompressedPassage) -> Measured | None:
    values = passage.info[MARK]["values"]
    return None if values is None else tuple(values)
