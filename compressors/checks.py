"""Checks that the methods' configs share: each raises ``ValueError`` naming the field, what was wanted and what was got."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


def check_counts(config: Any, least: Mapping[str, int], optional: Collection[str] = ()) -> None:
    """Fields that must be integers of at least a number; ``optional`` ones may be ``None``."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")


def check_ratio(ratio: float, meaning: str = "source tokens per slot") -> None:
    """A compression ratio."""
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio is {meaning} and must be a finite number of at least 1, got {ratio!r}.")


def check_choices(config: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Fields that must hold one of some values."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(config, name)!r}.")


def check_lora(config: Any) -> None:
    """The LoRA fields ``r``, ``alpha``, ``dropout`` and ``target_modules``, which becomes a tuple."""
    check_counts(config, {"r": 1})
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {config.dropout!r}.")
    if not config.alpha > 0:
        raise ValueError(f"alpha must be positive, got {config.alpha!r}.")
    if config.target_modules is None:
        return
    if isinstance(config.target_modules, str) or not config.target_modules:
        raise ValueError(
            f"target_modules must be a list of at least one module name, got {config.target_modules!r}; leave it out for the "
            "default."
        )
    config.target_modules = tuple(config.target_modules)
