"""What must stay of a passage: settings that every method with a budget shares."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .units import Span, keep_spans


@dataclass(kw_only=True)
class KeepSettings:
    """Config mixin: the words of a passage that a method keeps before all others."""

    keep: tuple[str, ...] = field(
        default=(), metadata={"help": "strings that stay, with the words around them, while they fit"}
    )
    keep_patterns: tuple[str, ...] = field(
        default=(), metadata={"help": "regular expressions: the words around their matches stay"}
    )
    keep_digits: bool = field(default=False, metadata={"help": "numbers stay while they fit"})
    keep_names: bool = field(default=False, metadata={"help": "capitalised names stay while they fit"})

    def check_keep(self) -> None:
        """Makes the lists tuples. Raises ``ValueError`` for anything but non-empty strings and valid expressions."""
        for name in ("keep", "keep_patterns"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} must be a list of non-empty strings, got {value!r}.")
            setattr(self, name, tuple(value))
        for pattern in self.keep_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"keep_patterns holds {pattern!r}, no valid regular expression: {error}.") from error

    @property
    def keeps(self) -> bool:
        """Whether anything must stay."""
        return bool(self.keep or self.keep_patterns or self.keep_digits or self.keep_names)

    def kept_spans(self, text: str) -> list[Span]:
        """``(start, end)`` characters of a text that must stay, in order, without overlap."""
        return keep_spans(text, self.keep, self.keep_patterns, self.keep_digits, self.keep_names)
