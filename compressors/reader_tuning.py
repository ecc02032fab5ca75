"""A tuned reader for methods whose reader is frozen in their papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Compressor
from .checks import check_counts
from .settings import added
from .twin import LoRATwin


@dataclass(kw_only=True)
class ReaderTuningSettings:
    """Mixin of a compressor's config: whether the reader is tuned together with the compressor, by LoRA of its own.

    What it answers then comes of the compression and of the tuning: compare it with a reader of full text that was tuned on
    the same data for as many steps (method ``full-text``), not with the reader as it was.
    """

    tune_reader: bool = added(False, "tune the reader that reads the slots too, by LoRA of its own: compressor.reader")
    reader_r: int = added(16, "LoRA rank of the tuned reader")
    reader_alpha: float = added(32.0, "LoRA scale of the tuned reader: updates are multiplied by alpha / r")
    reader_target_modules: tuple[str, ...] | None = added(
        None, "modules of the tuned reader that get LoRA; default: target_modules, or query and value projections"
    )

    def check_reader_tuning(self) -> None:
        """Raises ``ValueError`` for values that cannot be; makes ``reader_target_modules`` a tuple."""
        if not isinstance(self.tune_reader, bool):
            raise ValueError(f"tune_reader must be true or false, got {self.tune_reader!r}.")
        check_counts(self, {"reader_r": 1})
        if not self.reader_alpha > 0:
            raise ValueError(f"reader_alpha must be positive, got {self.reader_alpha!r}.")
        if self.reader_target_modules is None:
            return
        if isinstance(self.reader_target_modules, str) or not self.reader_target_modules:
            raise ValueError(f"reader_target_modules must be a list of names, got {self.reader_target_modules!r}.")
        self.reader_target_modules = tuple(self.reader_target_modules)


def tuned_reader(compressor: Compressor) -> LoRATwin | None:
    """The twin that a compressor's ``reader`` reads with from here on, if its config asks for one.

    The compressor keeps it as its ``reader_twin``: its weights are saved and trained with the compressor's.
    """
    config: Any = compressor.config
    if not config.tune_reader:
        return None
    targets = config.reader_target_modules or getattr(config, "target_modules", None)
    twin = LoRATwin(
        compressor.base_reader.model,
        r=config.reader_r,
        alpha=config.reader_alpha,
        dropout=getattr(config, "dropout", 0.0),
        target_modules=targets,
    )
    compressor.adapt_reader(twin)
    return twin
