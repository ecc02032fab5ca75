"""Time to the first token of a benchmark's own prompts, in turns with the full text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ...compressors import Reader
from ...recipes.data.templates import Piece
from .clock import answer_parts


def first_token_times(
    reads: Reader,
    prompts: Sequence[list[Piece]],
    reader: Reader,
    full: Sequence[list[Piece]],
    *,
    requests: int,
    repeats: int = 3,
    fresh: Callable[[int], list[Piece]] | None = None,
) -> tuple[float, float]:
    """Median milliseconds of a line's prompts and of the full text's, one request at a time.

    Laying the prompt out and prefill count. Slots are in memory, as making and loading them is what `nutgraf bench speed`
    measures; but what can only be made when the question is there is made anew, and counts. The two take turns, after a
    round of warm-up, so that a change of the machine's pace meets both.

    Args:
        reads: who reads the line's prompts. `prompts`: of all questions.
        reader: who reads the full text's, `full`, of the same questions.
        requests: questions timed, evenly spread.
        repeats: times each.
        fresh: makes the prompt of question i anew, compressing its passages; for methods that need the question.

    Raises ValueError for no request, or lists that differ in length.
    """
    if requests < 1 or not prompts or len(prompts) != len(full):
        raise ValueError(
            f"Timing needs at least one request and as many full prompts as others, got {requests} of {len(prompts)} and "
            f"{len(full)}."
        )
    count = min(requests, len(prompts))
    chosen = [i * len(prompts) // count for i in range(count)]
    times: list[float] = []
    full_times: list[float] = []
    for turn in range(1 + repeats):
        for i in chosen:
            ours = answer_parts(reads, lambda i=i: [fresh(i) if fresh else prompts[i]], 1).ttft  # type: ignore[misc]
            theirs = answer_parts(reader, lambda i=i: [full[i]], 1).ttft  # type: ignore[misc]
            if turn:
                times.append(ours)
                full_times.append(theirs)
    return statistics.median(times), statistics.median(full_times)
