"""What the methods share whose scores come from a causal LM: which model scores, and how much of a text it reads at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..reader.reader import Reader
from .selection import SelectingCompressor, SelectionConfig

MODES = ("fast", "faithful")


@dataclass
class LMSelectionConfig(SelectionConfig):
    """Settings of every method that scores tokens with a causal LM."""

    method: ClassVar[str]

    mode: Literal["fast", "faithful"] = field(
        default="fast",
        metadata={"help": "'fast': one pass, exact budget; 'faithful': the published computation, defects included"},
    )
    scorer: str | None = field(
        default=None, metadata={"help": "hub id or folder of the causal LM that scores; default: the reader itself"}
    )
    window: int = field(default=2048, metadata={"help": "longest stretch of text that the scorer reads at once (fast)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}.")
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window must be an integer of at least 2, got {self.window!r}.")


class LMSelectingCompressor(SelectingCompressor):
    """A selecting compressor whose tokens are scored by a causal LM.

    Args:
        config: the settings.
        reader: the reader; its tokens are what the budget counts.
        scorer: the causal LM that scores, in place of loading ``config.scorer``.
    """

    config: LMSelectionConfig

    def __init__(self, config: LMSelectionConfig, reader: Reader, *, scorer: Reader | None = None) -> None:
        super().__init__(config, reader)
        if scorer is None:
            scorer = reader if config.scorer is None else Reader.from_pretrained(config.scorer, device=reader.device)
        self._scorer = (scorer,)  # a tuple, as for the reader: held, not owned

    @property
    def scorer(self) -> Reader:
        """The causal LM that scores."""
        return self._scorer[0]

    def identity_parts(self) -> list[Any]:
        """Reader and scorer."""
        return [*super().identity_parts(), self.scorer.fingerprint]
