"""Settings of all text methods: the budget, the units, and what must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ..core.config import CompressorConfig, ConfigT, added, check_choices, check_counts, check_ratio
from ..core.keep import KeepSettings
from ..core.units import LEVELS

MODES = ("fast", "published")
_OLD_NAME = "faithful"  # of mode "published" in older configs, and in fingerprints


@dataclass(kw_only=True)
class SelectionSettings(KeepSettings):
    """Config mixin of every text method: the budget, the units, and what must stay."""

    ratio: float = field(default=2.0, metadata={"help": "compression ratio if a call gives no budget"})
    unit: str = field(default="phrase", metadata={"help": f"kept or dropped as a whole: one of {', '.join(LEVELS)}"})
    joiner: str = field(default=" ", metadata={"help": "text between kept spans that do not touch"})
    mode: Literal["fast", "published"] = field(
        default="fast",
        metadata={"help": "'fast': exact budget; 'published': the released algorithm ('faithful' in older configs)"},
    )
    max_tokens: int | None = added(None, "the reader's tokens of each result, instead of a ratio")


@dataclass
class SelectionConfig(SelectionSettings, CompressorConfig):
    """Base config of text methods.

    Options of ``mode="published"`` alone are in a field ``published`` of the class `options_class`. `from_dict` and
    `to_dict` hold them flat, beside the other settings.
    """

    method: ClassVar[str]
    cost: ClassVar[str] = "scores"
    options_class: ClassVar[type[CompressorConfig] | None] = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "source tokens per kept token")
        if self.mode == _OLD_NAME:
            self.mode = "published"
        check_choices(self, {"unit": LEVELS, "mode": MODES})
        check_counts(self, {"max_tokens": 1}, optional=["max_tokens"])
        self.check_keep()

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-able dict for `from_dict`."""
        found = super().to_dict()
        options = found.pop("published", None)
        return found if options is None else found | self.published.to_dict()  # type: ignore[attr-defined]

    def identity(self) -> dict[str, Any]:
        """What the fingerprint hashes."""
        return super().identity() | ({"mode": _OLD_NAME} if self.mode == "published" else {})

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Builds the config; raises ``ValueError`` for unknown keys."""
        options_class = cls.options_class  # type: ignore[attr-defined]
        if options_class is not None and isinstance(data, Mapping):
            names = {f.name for f in fields(options_class)}
            flat = {name: value for name, value in data.items() if name in names}
            given = data.get("published", {})
            given = given.to_dict() if isinstance(given, options_class) else given
            if not isinstance(given, Mapping):
                raise ValueError(f"published holds options by name, got a {type(given).__name__}.")
            options = options_class.from_dict({**given, **flat})
            data = {**{name: value for name, value in data.items() if name not in names}, "published": options}
        return super().from_dict(data)  # type: ignore[misc]
