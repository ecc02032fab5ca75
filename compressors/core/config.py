"""Base class of all method configs, with the checks and field helpers that they share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    pass


ConfigT = TypeVar("ConfigT", bound="CompressorConfig")


@dataclass
class CompressorConfig:
    """Settings of a compressor. Subclasses are dataclasses that validate in ``__post_init__``."""

    method: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` takes back, in the constructor's order: keyword-only settings come last.

        Settings that came later (`nutgraf.compressors.core.config.added`) are left out at their defaults.
        """
        found = asdict(self)
        return {f.name: found[f.name] for f in written(self)}

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Builds the config. Raises ``ValueError`` for keys that it does not have."""
        if not is_dataclass(cls):
            raise TypeError(f"{cls.__name__} must be a dataclass.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"{cls.__name__} has no settings {unknown}; it has {sorted(known)}.")
        return cls(**data)


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


def added(default: Any, text: str) -> Any:
    """A field that came later: at its default it is left out of `CompressorConfig.to_dict`.

    So the fingerprint of an older checkpoint, and all that is stored under it, stays what it was.

    Args:
        default: what the method did before there was the setting.
        text: the setting's help.
    """
    return field(default=default, kw_only=True, metadata={"help": text, "added": True})


def written(config: Any) -> list[Field[Any]]:
    """A config's fields that are written down, in the constructor's order: keyword-only ones come last."""
    kept = [f for f in fields(config) if not (f.metadata.get("added") and getattr(config, f.name) == f.default)]
    return sorted(kept, key=lambda f: bool(f.kw_only))
