"""What a reward trains: compressors that draw their output, with its probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """A compressed text that was drawn, or chosen as the likeliest.

    Attributes:
        text: the text; may be empty.
        log_prob: its log probability, a number that is differentiable in the compressor's weights.
        entropy: mean entropy of the decisions in nats, differentiable; 0 if unknown.
    """

    text: str
    log_prob: Tensor
    entropy: Tensor


@runtime_checkable
class Sampler(Protocol):
    """A compressor that a recipe of kind `rewards` trains."""

    def sample(
        self, texts: Sequence[str], queries: Sequence[str | None], ratio: float | None, count: int, seed: int
    ) -> list[list[Sample]]:
        """For each text its likeliest compressed form, then ``count`` drawn ones.

        Args:
            texts: the passages, none of them empty.
            queries: the question of each, or ``None``.
            ratio: compression ratio of a method with a length limit.
            count: drawn forms per text.
            seed: of the draws.
        """
        ...
