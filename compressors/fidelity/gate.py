"""The fidelity gate: predicts from a compressed passage alone whether answers survive its compression.

The reader answers questions made from the passage by rule, and repeats the passage, from the slots and from the text (see
`probes`). The differences are calibrated on dev data to the probability that an answer from the slots is as good as one from
the text. Passages below a threshold are read as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from ..base import Compressor, evaluating
from ..core.errors import CheckpointError, ReaderMismatchError
from ..core.files import write_atomically
from ..core.fingerprint import hash_json
from ..core.passage import CompressedPassage
from ..core.textfiles import check_strings
from ..reader.reader import Reader
from .calibration import MonotoneLogistic, signal_rows, threshold_leaving
from .probes import FidelityConfig, Measured, measure

LEVELS = {"low": 0.75, "medium": 0.5, "high": 0.25}  # share of the loss on dev data that may remain
FILE_NAME = "fidelity.json"
MARK = "fidelity"  # the key in a passage's info
_VERSION = 1
_UNFITTED = "The gate is not calibrated: call fit with dev data, or load one with from_pretrained."

Fidelity = str | float


class FidelityGate:
    """Scores compressed passages: the probability that an answer from the slots is as good as one from the text.

    Empty passages, and those with a text longer than the reader's room, score 1 and are never sent as text.

    Attributes:
        compressor: makes the passages; its reader reads both forms.
        config: what is measured.
        calibration: maps signals to the probability; ``None`` before `fit`.
        thresholds: by the names ``"low"``, ``"medium"`` and ``"high"``.
        price: mean reader tokens saved per compressed passage on the dev data; ``None``: not counted.

    Example::

        gate = FidelityGate(compressor)
        gate.fit(gate.measure(compressor.compress(texts), texts), targets)
        gate.save_pretrained("gate")
        gate = FidelityGate.from_pretrained("gate", compressor)
        CompressedContextPostprocessor(compressor, fidelity="high", gate=gate)
    """

    def __init__(self, compressor: Compressor, config: FidelityConfig | None = None) -> None:
        self.compressor = compressor
        self.config = config or FidelityConfig()
        self.calibration: MonotoneLogistic | None = None
        self.thresholds: dict[str, float] = {}
        self.price: float | None = None
        self._made_for: tuple[str, str] | None = None
        self._fitted_on = 0

    @property
    def reader(self) -> Reader:
        """The compressor's reader."""
        return self.compressor.reader

    @property
    def measure_id(self) -> str:
        """Identifies the marks in ``info``: it changes with the config, but not with the calibration."""
        return hash_json("fidelity", _VERSION, asdict(self.config))

    # -- measuring -------------------------------------------------------------------------------------------------

    def measure(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], *, batch_size: int = 16
    ) -> list[Measured | None]:
        """Measures passages, without gradients and independent of their batch.

        Args:
            batch_size: prompts per pass; a passage has up to ``probes`` + 1.

        Returns:
            Per passage one number per signal, ``None`` for a signal that cannot be measured; or ``None`` for a passage that
            is empty, or with a text longer than the reader's room.

        Raises:
            ValueError: if the lists differ in length, or another compressor made a passage.
        """
        _check_pairs(passages, texts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        made_by = self.compressor.fingerprint
        if bad := next((p.compressor for p in passages if p.compressor != made_by), None):
            raise ValueError(f"The gate scores passages of the compressor {made_by}, but one was made by {bad}.")
        with evaluating(self.compressor):
            return measure(self.reader, self.config, passages, texts, batch_size)

    def mark(
        self, passages: Sequence[CompressedPassage], texts: Sequence[str], *, batch_size: int = 16
    ) -> list[CompressedPassage]:
        """Adds the signals to ``info["fidelity"]`` of passages that lack them; arguments as for `measure`.

        Stores keep ``info``, so a passage is measured once, at indexing time.
        """
        _check_pairs(passages, texts)
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

    # -- scoring ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        measured: Sequence[Measured | None],
        targets: Sequence[float],
        weights: Sequence[float] | None = None,
        *,
        saved: Sequence[int] | None = None,
    ) -> FidelityGate:
        """Calibrates the gate on dev data and sets its thresholds.

        With ``saved`` the score also counts what a passage costs as text: 1 - (1 - p) * (mean tokens saved) / (tokens
        saved). The passages that lose most per saved token then come first.

        Args:
            measured: from `measure`; passages without signals are left out.
            targets: quality of answers from the slots relative to the text, in [0, 1], such as 1 minus the mean loss of F1.
            weights: weight of each passage (its number of questions); default: equal.
            saved: tokens minus slots of each passage.

        Raises:
            ValueError: if the lists differ in length, or there are too few passages.
        """
        counts = [1.0] * len(measured) if weights is None else list(weights)
        spared = [1] * len(measured) if saved is None else list(saved)
        if not len(measured) == len(targets) == len(counts) == len(spared):
            raise ValueError(
                "Calibration needs one target (weight, and tokens saved) per measured passage, got "
                f"{len(measured)} passages, {len(targets)} targets, {len(counts)} weights and {len(spared)} numbers of tokens."
            )
        there, rows = self._rows(measured)
        good, count = np.array([targets[i] for i in there], dtype=float), np.array([counts[i] for i in there])
        self.calibration = MonotoneLogistic.fit(rows, good, count)
        self._made_for = (self.compressor.fingerprint, self.reader.fingerprint)
        self._fitted_on = len(there)
        spared = [max(spared[i], 1) for i in there]
        self.price = None if saved is None else float(np.average(spared, weights=count))
        scores = self._priced(self.calibration(rows), spared)
        self.thresholds = {name: threshold_leaving(scores, (1 - good) * count, left) for name, left in LEVELS.items()}
        return self

    def _rows(self, measured: Sequence[Measured | None]) -> tuple[list[int], np.ndarray]:
        """The measured passages' indices and signals ``[n, signals]``."""
        there = {i: values for i, values in enumerate(measured) if values is not None}
        return list(there), signal_rows(list(there.values()), len(self.config.signals))

    def check_fits(self, compressor: Compressor) -> None:
        """Raises ``ValueError`` unless the gate is calibrated for this compressor, in its current state, and its reader."""
        if self.calibration is None or self._made_for is None:
            raise ValueError(_UNFITTED)
        now = (compressor.fingerprint, compressor.reader.fingerprint)
        for what, wanted, got in zip(("compressor", "reader"), self._made_for, now):
            if wanted != got:
                raise ReaderMismatchError(
                    f"The gate was calibrated for the {what} {wanted}, but this one is {got}; calibrate a gate for it: "
                    "nutgraf bench gate FILE --compressor NAME --save FOLDER."
                )

    def scores_of(self, measured: Sequence[Measured | None], saved: Sequence[int] | None = None) -> list[float]:
        """Scores passages from `measure`; ``saved`` as in `fit`.

        Raises:
            ValueError: if the gate is not fitted, or was fitted with ``saved`` and gets none of this length.
        """
        self.check_fits(self.compressor)
        if self.price is not None and (saved is None or len(saved) != len(measured)):
            raise ValueError("This gate counts what passages cost as text: give saved, the tokens minus slots of each.")
        scores = [1.0] * len(measured)
        there, rows = self._rows(measured)
        if there:
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
        """Scores passages; the lowest are sent as text first. Without a price a score is the calibrated probability.

        Marked passages are not measured again. Arguments and errors as for `measure`.
        """
        marked = self.mark(passages, texts, batch_size=batch_size)
        values = [None if (found := p.info[MARK]["values"]) is None else tuple(found) for p in marked]
        return self.scores_of(values, [p.source_tokens - p.slots for p in marked])

    def threshold(self, fidelity: Fidelity) -> float:
        """The score below which a passage is read as text.

        Args:
            fidelity: ``"low"``, ``"medium"`` or ``"high"``: passages read compressed lost at most 75, 50 or 25 % of the whole
                loss on the dev data; or the score itself, in (0, 1).

        Raises:
            ValueError: for anything else, or for a name if the gate is not fitted.
        """
        if isinstance(fidelity, str) and fidelity in LEVELS:
            if not self.thresholds:
                raise ValueError(_UNFITTED)
            return self.thresholds[fidelity]
        if isinstance(fidelity, int | float) and not isinstance(fidelity, bool) and 0 < fidelity < 1:
            return float(fidelity)
        raise ValueError(f"fidelity must be low, medium, high or a number between 0 and 1, got {fidelity!r}.")

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``fidelity.json``, possibly into the compressor's folder. Raises ``ValueError`` if the gate is not fitted."""
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
        """Loads a gate written by `save_pretrained`, for the same compressor and reader.

        Raises:
            CheckpointError: if the file is missing or damaged.
            ReaderMismatchError: if the gate was calibrated for another compressor or reader.
        """
        path = Path(folder) / FILE_NAME
        try:
            about = json.loads(path.read_text())
            if about["version"] != _VERSION:
                raise ValueError(f"it has version {about['version']!r}, this release reads {_VERSION}")
            if unknown := sorted(set(about["config"]) - {field.name for field in fields(FidelityConfig)}):
                raise ValueError(f"it has unknown settings {unknown}")
            gate = cls(compressor, FidelityConfig(**{**about["config"], "signals": tuple(about["config"]["signals"])}))
            gate.calibration = MonotoneLogistic.from_dict(about["calibration"])
            if len(gate.calibration.weights) != len(gate.config.signals):
                raise ValueError("its numbers of weights and signals differ")
            gate.thresholds = {name: float(about["thresholds"][name]) for name in LEVELS}
            gate.price = None if about.get("price") is None else float(about["price"])
            if gate.price is not None and not 0 < gate.price < float("inf"):
                raise ValueError(f"its price must be a positive number, got {gate.price!r}")
            gate._made_for = (str(about["compressor"]), str(about["reader"]))
            gate._fitted_on = int(about.get("passages", 0))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} is no readable fidelity gate: {error!r}.") from error
        gate.check_fits(compressor)
        return gate


def _check_pairs(passages: Sequence[CompressedPassage], texts: Sequence[str]) -> None:
    if len(passages) != len(check_strings("texts", texts, "source texts")):
        raise ValueError(f"Each passage needs its source text: got {len(passages)} and {len(texts)}.")
