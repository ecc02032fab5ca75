"""Labels of a passage's sentences for one question: which of them an answer needs.

`needed` marks one sentence. `inclusion`, `lexical` and `gain` are FILCO's three oracles (arXiv 2311.08377, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compressors import Reader
from ...compressors.core.units import Span
from ...compressors.fidelity.questions import ASKED
from ...compressors.text.scoring import self_information
from ..data.answer_scores import f1, normalize
from .token_labels import content_stems

Value = float | None  # 0 to 1, or None if unknown


def holds(text: str, answer: str) -> bool:
    """Whether a text contains an answer as whole words, both in SQuAD's normal form. False for an empty answer."""
    wanted = normalize(answer)
    return bool(wanted) and f" {wanted} " in f" {normalize(text)} "


def needed(sentences: Sequence[str], question: str, answer: str) -> list[Value]:
    """1 for the sentence that contains the answer and shares most words with the question, 0 for the others.

    Further sentences with the answer are unknown. Without the answer's own words, the sentence counts that shares most words
    with question and answer; those with at least half as many are unknown.
    """
    inside = [holds(sentence, answer) for sentence in sentences]
    asked = content_stems(question) if any(inside) else content_stems(question) | content_stems(answer)
    shared = [len(content_stems(sentence) & asked) for sentence in sentences]
    if any(inside):
        best = max((i for i, found in enumerate(inside) if found), key=lambda i: (shared[i], -i))
        return [1.0 if i == best else None if found else 0.0 for i, found in enumerate(inside)]
    most = max(shared, default=0)
    if not most:
        return [None] * len(sentences)
    best = shared.index(most)
    return [1.0 if i == best else None if 2 * n >= most else 0.0 for i, n in enumerate(shared)]


def inclusion(sentences: Sequence[str], question: str, answer: str) -> list[Value]:
    """1 for each sentence that contains the answer (StrInc), else 0."""
    return [float(holds(sentence, answer)) for sentence in sentences]


def lexical(sentences: Sequence[str], question: str, answer: str) -> list[Value]:
    """F1 of the words of each sentence and the answer (Lexical)."""
    return [f1(sentence, [answer]) for sentence in sentences]


def gain(reader: Reader, sentences: Sequence[str], question: str, answer: str) -> list[Value]:
    """How much more likely each sentence makes the answer: the sigmoid of ``log p(a | s, q) - log p(a | q)`` (CXMI)."""
    if not sentences or not answer.strip():
        return [None] * len(sentences)
    asked = ASKED.format(question=question)
    prompts = [asked.lstrip("\n"), *(sentence.strip() + asked for sentence in sentences)]
    found = self_information(reader, [f" {answer.strip()}"] * len(prompts), prefixes=prompts)
    alone, *after = [float(scores.nll.sum()) for scores in found]
    return torch.tensor([alone - loss for loss in after]).sigmoid().tolist()


def texts_of(passage: str, spans: Sequence[Span]) -> list[str]:
    """The sentences as strings."""
    return [passage[a:b] for a, b in spans]
