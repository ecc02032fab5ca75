"""Checks that methods share: each raises ``ValueError`` naming the field, what was wanted and what was got."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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


def check_queries(name: str, queries: Sequence[str | None]) -> None:
    """Raises ``ValueError`` for passages without a question."""
    if missing := [i for i, query in enumerate(queries) if query is None or not query.strip()]:
        raise ValueError(
            f"This {name} compresses passages for a question (query_aware) and got none for passage {missing[0]}; pass "
            "compress(texts, query=...)."
        )
