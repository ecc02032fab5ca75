"""How PISCO and COCOM cut passages into segments, and how many slots each segment gets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pisco import PISCOConfig


class PISCOPlan:
    """Lengths of segments and numbers of slots, kept within the encoder's positions.

    Args:
        config: the compressor's settings.
        limit: the encoder's positions; ``None``: no limit.
        around: tokens that every segment is read with (prefix and suffix).
    """

    def __init__(self, config: PISCOConfig, limit: int | None, around: int) -> None:
        self.config, self.limit, self.around = config, limit, around

    def longest(self, question_tokens: int = 0) -> int:
        """Tokens that one segment may have, behind a question.

        Raises:
            ValueError: if the <MEM> tokens and the question leave no room for any.
        """
        found = self.config.segment_tokens
        if self.limit is not None:
            found = min(found, self.limit - self.around - self.most_slots - question_tokens)
        if found < 1:
            asked = f", its question of {question_tokens} tokens" if question_tokens else ""
            raise ValueError(
                f"The encoder's {self.limit} positions have no room for a segment{asked} and its <MEM> tokens."
            )
        return found

    @property
    def most_slots(self) -> int:
        """Slots that room is kept for in every segment."""
        config = self.config
        return config.memory_tokens if config.memory_tokens > 1 else math.ceil(config.segment_tokens / config.ratio) + 1

    def cut(self, n_tokens: int, ratio: float, source_tokens: int, question_tokens: int = 0) -> list[tuple[int, int]]:
        """``(encoder tokens, slots)`` of each segment of a passage, in order.

        Args:
            n_tokens: its length in the encoder's tokens.
            ratio: compression ratio; ``slots="fixed"`` knows the config's alone.
            source_tokens: its length in the reader's tokens, which the number of slots goes by.
            question_tokens: encoder tokens of the question in front of each segment.
        """
        config = self.config
        if not n_tokens or not source_tokens:
            return []
        if config.slots == "plus-one":
            return self._greedy(n_tokens, ratio)
        count = -(-n_tokens // self.longest(question_tokens))
        total = math.ceil(source_tokens / ratio - 1e-6)
        if config.slots == "proportional":
            if config.memory_tokens > 1:
                count = min(max(count, -(-total // config.memory_tokens)), n_tokens)
                total = min(total, count * config.memory_tokens)
            total = min(max(total, count), source_tokens)
        cut = even_shares(n_tokens, count)
        if config.slots == "fixed":
            return [(n, int(config.segment_tokens / config.ratio + 1e-6)) for n in cut]
        return list(zip(cut, even_shares(total, count)))

    def _greedy(self, n_tokens: int, ratio: float) -> list[tuple[int, int]]:
        """Segments of the authors' code: full ones and a shorter last one, one slot more than their share each."""
        longest = self.longest()
        cut = [min(longest, n_tokens - start) for start in range(0, n_tokens, longest)]
        return [(n, int(n // ratio) + 1) for n in cut]


def even_shares(total: int, count: int) -> list[int]:
    """``count`` integers that add up to ``total`` and differ by at most one."""
    ends = [i * total // count for i in range(count + 1)]
    return [b - a for a, b in zip(ends, ends[1:])]
