"""The LoRA settings that the config of every method with a tuned model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from .checks import check_counts


class LoRAArguments(TypedDict):
    """Arguments of `LoRATwin` and `tune`."""

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | None


def lora_rank(default: int, of: str = "") -> Any:
    """The field ``r`` with a method's own default; ``of`` says what the rank is of."""
    return field(default=default, kw_only=True, metadata={"help": f"LoRA rank{of}"})


def lora_alpha(default: float) -> Any:
    """The field ``alpha`` with a method's own default."""
    return field(default=default, kw_only=True, metadata={"help": "LoRA scale: updates are multiplied by alpha / r"})


@dataclass(kw_only=True)
class LoRASettings:
    """Mixin of a compressor's config: the fields, their checks, and the arguments that `LoRATwin` and `tune` take.

    A method with other defaults declares the field anew: ``r: int = lora_rank(16)``. The fields are keyword-only, so that
    a config's own fields come first in its constructor.
    """

    r: int = lora_rank(32)
    alpha: float = lora_alpha(32.0)
    dropout: float = field(default=0.0, metadata={"help": "LoRA dropout in training"})
    target_modules: tuple[str, ...] | None = field(
        default=None, metadata={"help": "modules that get LoRA; default: query and value projections, or the fused one"}
    )

    @property
    def lora(self) -> LoRAArguments:
        """The keyword arguments that `LoRATwin` and `tune` take."""
        return {"r": self.r, "alpha": self.alpha, "dropout": self.dropout, "target_modules": self.target_modules}

    def check_lora(self) -> None:
        """Raises ``ValueError`` for values that no LoRA can have; makes ``target_modules`` a tuple."""
        check_counts(self, {"r": 1})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}.")
        if self.target_modules is None:
            return
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(
                f"target_modules must be a list of at least one module name, got {self.target_modules!r}; leave it out for "
                "the default."
            )
        self.target_modules = tuple(self.target_modules)
