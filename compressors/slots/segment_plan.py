"""How AutoCompressor cuts passages into segments, and how many summary vectors each segment gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..reader.reader import Reader
from ..soft.autocompressor_config import AutoCompressorConfig
from .segments import equal_lengths, slots_for


class SegmentPlan:
    """Lengths of segments and numbers of summary vectors, kept within the reader's positions.

    Args:
        config: the compressor's settings.
        reader: whose positions limit a segment.
        opening: tokens in front of every pass (BOS).
        counts_slots: whether slots and summary tokens take positions of their own.
    """

    def __init__(self, config: AutoCompressorConfig, reader: Reader, opening: int, *, counts_slots: bool) -> None:
        self.config, self.opening, self.counts_slots = config, opening, counts_slots
        self.limit, self.name = reader.max_positions, reader.name

    def longest(self, ratio: float) -> int:
        """Tokens that one segment may have. Raises ``ValueError`` if the summary tokens leave no room for any."""
        config = self.config
        found = math.floor(config.summary_length * ratio + 1e-6)
        if config.segment_tokens is not None:
            found = min(found, config.segment_tokens)
        if self.limit is not None:
            found = min(found, self.limit - self.opening - config.summary_length * self.counts_slots)
        if found < 1:
            raise ValueError(
                f"{config.summary_length} summary tokens leave no room for a passage in the {self.limit} positions of "
                f"{self.name!r}; choose a smaller summary_length."
            )
        return found

    def slots(self, n_tokens: int, ratio: float) -> int:
        """Summary vectors of a segment."""
        if self.config.fixed_slots:
            return self.config.summary_length
        return slots_for(n_tokens, ratio, self.config.summary_length)

    def cut(self, n_tokens: int, ratio: float) -> list[tuple[int, int]]:
        """``(tokens, summary vectors)`` of each segment of a passage: as few segments as there can be.

        Raises:
            ValueError: as `check_room`.
        """
        longest = self.longest(ratio)
        if self.config.equal_segments:
            return self.sized(equal_lengths(n_tokens, longest), ratio)
        return self.sized([min(longest, n_tokens - start) for start in range(0, n_tokens, longest)], ratio)

    def sized(self, lengths: Sequence[int], ratio: float) -> list[tuple[int, int]]:
        """``(tokens, summary vectors)`` of segments of these lengths. Raises ``ValueError`` as `check_room`."""
        found = [(n, self.slots(n, ratio)) for n in lengths]
        self.check_room(found, ratio)
        return found

    def given(self, lengths: Sequence[int], n_tokens: int, ratio: float) -> list[tuple[int, int]]:
        """`sized` for lengths that a caller chose. Raises ``ValueError`` too unless they cut the passage as a whole."""
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths) or sum(lengths) != n_tokens:
            raise ValueError(
                f"segment_lengths must be integers of at least 1 that add up to the passage's {n_tokens} tokens, got "
                f"{list(lengths)}."
            )
        return self.sized(lengths, ratio)

    def check_room(self, cut: Sequence[tuple[int, int]], ratio: float) -> None:
        """Raises ``ValueError`` if a segment does not fit the reader's positions behind the soft prompt before it."""
        if self.limit is None or not self.counts_slots:
            return
        soft = needed = 0
        for length, slots in cut:
            needed = max(needed, self.opening + soft + length + slots)
            soft = soft + slots if self.config.accumulate_summary else slots
        if needed > self.limit:
            raise ValueError(
                f"A passage of {sum(n for n, _ in cut)} tokens at ratio {ratio:g} takes {needed} positions, its summaries "
                f"beside a segment, but {self.name!r} has {self.limit}; ask for a higher ratio, compress it in parts, or use "
                "accumulate_summary=False."
            )
