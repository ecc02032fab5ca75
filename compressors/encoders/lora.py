"""LoRA settings shared by all methods with a tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..base import Compressor
from ..core.config import added, check_counts, setting
from .lora_twin import LoRATwin
from .tuned_reader import AdaptedReader


class LoRAArguments(TypedDict):
    """Arguments of `LoRATwin` and `tune`."""

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | None


def lora_rank(default: int, of: str = "") -> Any:
    """Dataclass field for the LoRA rank. ``of`` is appended to the help text."""
    return setting(default, f"LoRA rank{of}", kw_only=True)


def lora_alpha(default: float) -> Any:
    """Dataclass field for the LoRA scale."""
    return setting(default, "LoRA scale: updates are multiplied by alpha / r", kw_only=True)


@dataclass(kw_only=True)
class LoRASettings:
    """Config mixin with LoRA settings. A method redeclares a field for another default: ``r: int = lora_rank(16)``."""

    r: int = lora_rank(32)
    alpha: float = lora_alpha(32.0)
    dropout: float = setting(0.0, "LoRA dropout in training")
    target_modules: tuple[str, ...] | None = setting(
        None, "modules that get LoRA; default: query and value projections, or the fused one"
    )

    @property
    def lora(self) -> LoRAArguments:
        """Keyword arguments of `LoRATwin` and `tune`."""
        return {"r": self.r, "alpha": self.alpha, "dropout": self.dropout, "target_modules": self.target_modules}

    def check_lora(self) -> None:
        """Raises ``ValueError`` for invalid values; makes ``target_modules`` a tuple."""
        check_counts(self, {"r": 1})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}.")
        self.target_modules = module_names("target_modules", self.target_modules)


@dataclass(kw_only=True)
class ReaderTuningSettings:
    """Config mixin: whether to tune the reader together with the compressor, with a second LoRA.

    Compare such a compressor with a reader of full text that was tuned on the same data for as many steps (method
    ``full-text``), not with the untuned reader.
    """

    tune_reader: bool = added(False, "also tune the reader of the slots, with its own LoRA: compressor.reader")
    reader_r: int = added(16, "LoRA rank of the tuned reader")
    reader_alpha: float = added(32.0, "LoRA scale of the tuned reader: updates are multiplied by alpha / r")
    reader_target_modules: tuple[str, ...] | None = added(
        None, "modules of the tuned reader that get LoRA; default: target_modules, or query and value projections"
    )

    def check_reader_tuning(self) -> None:
        """Raises ``ValueError`` for invalid values; makes ``reader_target_modules`` a tuple."""
        if not isinstance(self.tune_reader, bool):
            raise ValueError(f"tune_reader must be true or false, got {self.tune_reader!r}.")
        check_counts(self, {"reader_r": 1})
        if not self.reader_alpha > 0:
            raise ValueError(f"reader_alpha must be positive, got {self.reader_alpha!r}.")
        self.reader_target_modules = module_names("reader_target_modules", self.reader_target_modules)


def module_names(setting_name: str, value: Any) -> tuple[str, ...] | None:
    """A tuple of module names, or ``None``. Raises ``ValueError`` for a string or an empty list."""
    if value is not None and (isinstance(value, str) or not value):
        raise ValueError(f"{setting_name} must be a list of module names, got {value!r}; leave it out for the default.")
    return None if value is None else tuple(value)


def tuned_reader(compressor: Compressor) -> LoRATwin | None:
    """Sets a compressor's reader to a LoRA-tuned copy, if its config asks for that, and returns the twin.

    Assign it to ``reader_twin``, so that its weights are trained and saved with the compressor.
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
    compressor.adapt_reader(AdaptedReader(compressor.base_reader, twin))
    return twin
