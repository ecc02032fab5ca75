"""What a defence costs: the reader answers questions from what is stored after it."""

from __future__ import annotations

from collections.abc import Sequence

from ...compressors import CompressedPassage, Compressor, Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import question_prompt
from ..metrics import bootstrap_mean
from ..quality.scoring import answers, score_each
from ..rows import Row
from .targets import Target

LONGEST = 24  # tokens of an answer


def answering(target: Target, reader: Reader, records: Sequence[Record], seed: int = 0) -> Row:
    """F1 of the answers to questions about the target's passages, with its 95 % interval.

    Args:
        target: passages in their stored form; the compressor's own reader reads them, if it tuned one.
        reader: the reader of other targets.
        records: questions; of each passage the first one with an answer is asked.

    Returns:
        `answer_f1`, `answer_f1_ci_low`, `answer_f1_ci_high`, and `answers`, their number; nothing for retrieval vectors or
        without a question.
    """
    first = {record.gold_text: record for record in reversed(records) if record.answers and record.gold_text}
    pairs = [(one, first[text]) for one, text in zip(target.stolen, target.texts) if text in first]
    prompts = [question_prompt([one], record.question) for one, record in pairs if isinstance(one, CompressedPassage)]
    if not prompts:
        return {}
    reads = target.victim.reader if isinstance(target.victim, Compressor) else reader
    told = answers(reads, prompts, max_new_tokens=LONGEST, batch_size=16)
    f1 = score_each(told, [record for _, record in pairs])["f1"]
    low, high = bootstrap_mean(f1, seed=seed)
    return {"answer_f1": float(f1.mean()), "answer_f1_ci_low": low, "answer_f1_ci_high": high, "answers": len(f1)}
