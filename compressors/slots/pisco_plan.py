"""How PISCO and COCOM cut passages into segments, and how many slots each segment gets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .segment_overlap import in_front

if TYPE_CHECKING:
    from ..soft.pisco import PISCOConfig


class PISCOPlan:
    """Lengths of segments and numbers of slots, kept within the encoder's positions.

    Args:
        config: the compressor's settings.
        limit: the encoder's positions; ``None``: no limit.
        around: tokens that every segment is read with (prefix and suffix).
    """

    def __init__(self, config: PISCOConfig, limit: int | None, around: int) -> None:
        self.config, self.limit, self.around = config, limit, around

    def longest(self, question_tokens: int = 0, overlap: int = 0) -> int:
        """Tokens that one segment may have, behind a question and an overlap.

        Raises:
            ValueError: if they and the <MEM> tokens leave no room for any.
        """
        found = self.config.segment_tokens
        if self.limit is not None:
            found = min(found, self.limit - self.around - self.most_slots - question_tokens - overlap)
        if found < 1:
            words, advice = in_front(question_tokens, overlap)
            raise ValueError(
                f"The encoder's {self.limit} positions have no room for a segment and "
                f"{' and '.join([f'up to {self.most_slots} <MEM> tokens', *words])}; "
                f"{' or '.join(['lower segment_tokens or memory_tokens', *advice])}."
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
        many = config.slots == "proportional" and config.memory_tokens > 1
        if many:
            count = min(max(count, -(-total // config.memory_tokens)), n_tokens)
        if count > 1:
            count = max(count, -(-n_tokens // self.longest(question_tokens, config.segment_overlap)))
        if many:
            total = min(total, count * config.memory_tokens)
        if config.slots == "proportional":
            total = min(max(total, count), source_tokens)
        cut = even_shares(n_tokens, count)
        if config.slots == "fixed":
            return [(n, int(config.segment_tokens / config.ratio + 1e-6)) for n in cut]
        return list(zip(cut, even_shares(total, count)))

    def _greedy(self, n_tokens: int, ratio: float) -> list[tuple[int, int]]:
        """Segments of the authors' code: full ones and a shorter last one, one slot more than their share each."""
        longest = self.longest()
        if n_tokens > longest:
            longest = self.longest(overlap=self.config.segment_overlap)
        cut = [min(longest, n_tokens - start) for start in range(0, n_tokens, longest)]
        return [(n, int(n // ratio) + 1) for n in cut]


def even_shares(total: int, count: int) -> list[int]:
    """``count`` integers that add up to ``total`` and differ by at most one."""
    ends = [i * total // count for i in range(count + 1)]
    return [b - a for a, b in zip(ends, ends[1:])]
