"""Overlap of segments: the tokens in front of a segment, read again with it, so that none begins without context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..core.config import added, check_counts


@dataclass(kw_only=True)
class OverlapSettings:
    """Mixin of a compressor's config: how much of a long passage its encoder reads twice.

    A passage longer than a segment is cut, and each segment is read on its own as ``[BOS][question][overlap][segment]``.
    The overlap is context alone: every slot stands for tokens of its segment, as without it, and takes the same place among
    them; all of them stand so many positions later, as behind a question. A passage of one segment has none. Where the
    encoder's positions have no room for a segment, its overlap and its slots, segments are shorter.
    """

    segment_overlap: int = added(
        0,
        "tokens of a long passage that the encoder reads again in front of each segment but the first, so that no segment "
        "begins without context; they get no slots",
    )

    def check_overlap(self) -> None:
        """Raises ``ValueError`` unless the overlap is a number of tokens."""
        check_counts(self, {"segment_overlap": 0})


def overlaps(ids: Sequence[int], lengths: Iterable[int], most: int) -> list[list[int]]:
    """For each segment of a passage the ids that are read again in front of it: none for the first.

    Args:
        ids: the passage.
        lengths: tokens of each segment.
        most: the overlap, or as much of it as there is in front; it may be longer than the segment before.
    """
    starts = [0, *accumulate(lengths)][:-1]
    return [list(ids[max(start - most, 0) : start]) for start in starts]


def in_front(question_tokens: int, overlap: int) -> tuple[list[str], list[str]]:
    """For errors: what is read in front of a segment, and what would make it shorter."""
    words, advice = [], []
    if question_tokens:
        words.append(f"a question of {question_tokens} tokens")
        advice.append("ask more briefly")
    if overlap:
        words.append(f"an overlap of {overlap} tokens")
        advice.append("choose a smaller segment_overlap")
    return words, advice
