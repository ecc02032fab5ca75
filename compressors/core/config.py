"""Base class of all method configs, shared checks, and retired settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

ConfigT = TypeVar("ConfigT", bound="CompressorConfig")


_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}


@dataclass
class CompressorConfig:
    """Settings of a compressor. Subclasses are dataclasses that validate in ``__post_init__``.

    To retire a setting, delete its field and list it in ``retired`` with its default. Checkpoints that hold the default
    still load, with the same fingerprint. A setting made by `added` goes to ``retired_unhashed``, because its default was
    never part of a fingerprint.
    """

    method: ClassVar[str]
    title: ClassVar[str] = ""  # name in tables and plots; empty: the name of the method
    # What compressing a passage runs: the reader over passage and slots ("slots"), over the passage ("states") or over passage
    # and questions about it ("probes"), a language model with its head once ("scores") or with and without the question
    # ("contrast"), a projector on the index's vector ("vector"), a few cross-attention blocks ("blocks"), many passes of the
    # reader forward and back ("fit"), or nothing ("none": the passage is read whole).
    cost: ClassVar[str] = "slots"
    retired: ClassVar[Mapping[str, Any]] = {}
    retired_unhashed: ClassVar[Mapping[str, Any]] = {}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict for `from_dict`. Settings made by `added` are left out at their defaults."""
        found = asdict(self)
        kept = [f for f in fields(self) if not (f.metadata.get("added") and getattr(self, f.name) == f.default)]
        return {f.name: found[f.name] for f in sorted(kept, key=lambda f: bool(f.kw_only))}

    def identity(self) -> dict[str, Any]:
        """What the fingerprint hashes: `to_dict` and the defaults of retired settings."""
        return {**self.retired, **self.to_dict()}

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Builds the config.

        Raises:
            ValueError: if a setting is unknown, of a wrong type, or retired and not at its default.
        """
        if not is_dataclass(cls):
            raise TypeError(f"{cls.__name__} must be a dataclass.")
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__} is made of settings by name, got a {type(data).__name__}.")
        known = {f.name for f in fields(cls)}
        retired = {**cls.retired, **cls.retired_unhashed}
        if unknown := sorted(set(data) - known - set(retired)):
            raise ValueError(f"{cls.__name__} has no settings {unknown}; it has {sorted(known)}.")
        for name in sorted(set(data) - known):
            if data[name] != retired[name]:
                raise ValueError(
                    f"{cls.__name__} no longer has the setting {name}: only {retired[name]!r} is supported, got "
                    f"{data[name]!r}. Leave it out, or load the checkpoint with an older release."
                )
        types = {f.name: str(f.type) for f in fields(cls)}
        wrong = {n: v for n, v in data.items() if n in known and not _fits(v, types[n])}
        if odd := [f"{n} must be {_WORDS.get(types[n], types[n])}, got {v!r:.60}" for n, v in wrong.items()]:
            raise ValueError(f"{cls.__name__}: {'; '.join(odd)}.")
        return cls(**{name: value for name, value in data.items() if name in known})


# JSON types, and what the annotation of a setting that takes them holds; values are checked by the config itself.
_TAKEN: dict[type, tuple[str, ...]] = {
    str: ("str", "Literal"),
    bool: ("bool", "int", "float"),
    int: ("int", "float"),
    float: ("int", "float"),
    type(None): ("None",),
    list: ("tuple", "list", "Sequence"),
    dict: ("dict", "Mapping", "Options"),
}


def _fits(value: Any, annotation: str) -> bool:
    taken = _TAKEN.get(type(value))
    return taken is None or any(name in annotation for name in taken)


def check_counts(config: Any, least: Mapping[str, int], optional: Collection[str] = ()) -> None:
    """Raises ``ValueError`` unless each field is an integer of at least its minimum; ``optional`` fields may be ``None``."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")


def check_ratio(ratio: float, meaning: str = "source tokens per slot") -> None:
    """Raises ``ValueError`` unless the compression ratio is finite and at least 1."""
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio is {meaning} and must be a finite number of at least 1, got {ratio!r}.")


def ratio_for(tokens: int, least: int) -> str:
    """The ratio at which ``least`` of the tokens fit, rounded down so that it works as printed."""
    return f"{math.floor(100 * tokens / max(least, 1)) / 100:.2f}"


def check_choices(config: Any, choices: Mapping[str, Collection[Any]]) -> None:
    """Raises ``ValueError`` unless each field holds one of its choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(config, name)!r}.")


def check_queries(name: str, queries: Sequence[str | None]) -> None:
    """Raises ``ValueError`` if a passage has no question."""
    if missing := [i for i, query in enumerate(queries) if query is None or not query.strip()]:
        raise ValueError(
            f"This {name} compresses passages for a question (query_aware) and got none for passage {missing[0]}; pass "
            "compress(texts, query=...)."
        )


def setting(default: Any, text: str, *, kw_only: bool = False) -> Any:
    """Dataclass field with a default and its help text."""
    return field(default=default, kw_only=kw_only, metadata={"help": text})


def added(default: Any, text: str) -> Any:
    """Dataclass field for a setting added after a method's release.

    `CompressorConfig.to_dict` leaves it out at its default, so that older fingerprints do not change.

    Args:
        default: the earlier behaviour.
        text: help text.
    """
    return field(default=default, kw_only=True, metadata={"help": text, "added": True})
