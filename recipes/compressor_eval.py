"""How well a reader answers from compressed passages while they are being trained: quick scores, not a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from ..compressors import Compressor
from .answer_scores import f1
from .corpus import Record
from .templates import question_prompt


def compressed_scores(
    compressor: Compressor, records: Sequence[Record], ratio: float | None = None, max_new_tokens: int = 16
) -> dict[str, float]:
    """F1 (percent) of greedy answers in the plain format.

    Returns:
        `f1` with the passages compressed, `f1_shuffled` with those of other questions in their place, `f1_full` with the
        passages as text, `f1_none` without any, and `ratio`, source tokens per slot.
    """
    reader = compressor.reader
    texts = [text for record in records for text in record.passages]
    found = compressor.compress(texts, ratio=ratio, batch_size=32)
    taken = iter(found)
    contexts = [[next(taken) for _ in record.passages] for record in records]
    away = len(records) // 2 or 1  # half the list away: another article as a rule
    others = contexts[away:] + contexts[:away]
    prompts = {
        "f1": [question_prompt(c, r.question) for c, r in zip(contexts, records)],
        "f1_shuffled": [question_prompt(c, r.question) for c, r in zip(others, records)],
        "f1_full": [question_prompt(r.passages, r.question) for r in records],
        "f1_none": [question_prompt([], r.question) for r in records],
    }
    base = compressor.base_reader  # the fixed lines are those of the reader as it was given
    scores = {
        name: _f1(
            (base if name in ("f1_full", "f1_none") else reader).generate(p, max_new_tokens, batch_size=32), records
        )
        for name, p in prompts.items()
    }
    slots = sum(passage.slots for passage in found)
    return {**scores, "ratio": sum(passage.source_tokens for passage in found) / max(1, slots)}


def _f1(answers: Sequence[str], records: Sequence[Record]) -> float:
    return 100 * sum(f1(a.strip(), r.answers) for a, r in zip(answers, records)) / max(1, len(records))
