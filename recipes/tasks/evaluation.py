"""Quick scores of a compressor during training; `nutgraf bench` measures properly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from ...compressors import Compressor, Reader
from ..data.answer_scores import f1
from ..data.corpus import Record
from ..data.templates import question_prompt


def fixed_scores(reader: Reader, records: Sequence[Record], max_new_tokens: int = 16) -> dict[str, float]:
    """F1 (percent) that no compressor changes: `f1_full`, passages as text, and `f1_none`, no passages."""
    prompts = {
        "f1_full": [question_prompt(r.passages, r.question) for r in records],
        "f1_none": [question_prompt([], r.question) for r in records],
    }
    found = {name: _f1(reader.generate(p, max_new_tokens, batch_size=32), records) for name, p in prompts.items()}
    return {name: fmean(each) if each else 0.0 for name, each in found.items()}


def compressed_scores(
    compressor: Compressor,
    records: Sequence[Record],
    ratio: float | None = None,
    max_new_tokens: int = 16,
    fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """F1 (percent) of greedy answers in the plain format.

    Args:
        compressor: compresses each passage, with its question if it is query-aware.
        records: the questions.
        ratio: compression ratio; default: the compressor's own.
        max_new_tokens: length of an answer.
        fixed: `fixed_scores` of the untuned reader, if already known.

    Returns:
        `f1` with compressed passages and its standard error `f1_se`, `f1_shuffled` with the passages of other questions,
        `f1_full` and `f1_none` (see `fixed_scores`), and `ratio`, source tokens per slot.
    """
    texts = [text for record in records for text in record.passages]
    queries = [record.question for record in records for _ in record.passages] if compressor.query_aware else None
    found = compressor.compress(texts, queries, ratio, batch_size=32)
    taken = iter(found)
    contexts = [[next(taken) for _ in record.passages] for record in records]
    away = len(records) // 2 or 1  # half the list away: another article as a rule
    scores: dict[str, float] = {}
    for name, pieces in (("f1", contexts), ("f1_shuffled", contexts[away:] + contexts[:away])):
        prompts = [question_prompt(c, r.question) for c, r in zip(pieces, records)]
        each = _f1(compressor.reader.generate(prompts, max_new_tokens, batch_size=32), records)
        scores[name] = fmean(each) if each else 0.0
        if name == "f1":
            scores["f1_se"] = stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    slots = sum(passage.slots for passage in found)
    scores |= fixed_scores(compressor.base_reader, records, max_new_tokens) if fixed is None else fixed
    return {**scores, "ratio": sum(passage.source_tokens for passage in found) / max(1, slots)}


def _f1(answers: Sequence[str], records: Sequence[Record]) -> list[float]:
    return [100 * f1(answer.strip(), record.answers) for answer, record in zip(answers, records)]
