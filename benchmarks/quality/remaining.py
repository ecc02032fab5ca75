"""The lines of a table that a results file does not hold yet, so that a long run can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ..methods import EqualBudget, Method, Stored
from ..rows import Row
from .quality import Settings, questions_hash, readable
from .source_hash import code_of


def remaining(
    methods: Sequence[Method], rows: Sequence[Row], reader: Reader, records: Sequence[Record], settings: Settings
) -> list[Method]:
    """The methods that `rows` do not hold, measured by this code with these weights on these questions.

    The two fixed lines come first, as they are always needed, unless nothing remains. Raises ValueError as `readable` does.
    """
    questions = questions_hash(readable(reader, records, settings.max_new_tokens))
    kept = [row for row in rows if row.get("questions") == questions]
    fixed, others = list(methods[:2]), list(methods[2:])
    missing = [method for method in others if not holds(kept, method, reader, settings)]
    if not missing and all(holds(kept, method, reader, settings) for method in fixed):
        return []
    return [*fixed, *missing]


def holds(rows: Sequence[Row], method: Method, reader: Reader, settings: Settings) -> bool:
    """Whether one of the rows is this line under these settings, on any questions."""
    wanted = _identity(method, reader, settings)
    needed = ["f1_each", *(["ttft_ms"] if settings.ttft else []), *(["kl_to_full"] if settings.likelihood else [])]
    return any(
        all(row.get(key) == value for key, value in wanted.items()) and all(key in row for key in needed)
        for row in rows
    )


def _identity(method: Method, reader: Reader, settings: Settings) -> dict[str, Any]:
    compressor = method.compressor
    return {
        "suite": "quality",
        "dataset": settings.dataset,
        "method": method.name,
        "ratio_asked": method.ratio,
        "budget_of": method.of.name if isinstance(method, EqualBudget) else None,
        "store_precision": method.precision if isinstance(method, Stored) else None,
        "rouge_beta": settings.beta,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "dtype": str(reader.dtype).removeprefix("torch."),
        "reader": reader.fingerprint,
        "compressor": None if compressor is None else compressor.fingerprint,
        "code": code_of(compressor),
    }
