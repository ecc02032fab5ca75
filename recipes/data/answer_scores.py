"""SQuAD's answer scores, for training and benchmarks."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ...compressors.core.textfiles import check_strings

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """SQuAD's normal form (arXiv 1606.05250): lower case, no ASCII punctuation, no articles, single spaces.

    >>> normalize("The  Beatles' best-known song")
    'beatles bestknown song'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normal form of the prediction equals that of a reference answer, else 0.0."""
    guess = normalize(prediction)
    return best(answers, lambda answer: float(guess == normalize(answer)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the bag of normalised words; maximum over the reference answers.

    Two empty normal forms score 1.0, an empty and a non-empty one 0.0.
    """
    return best(answers, lambda answer: _bag_f1(normalize(prediction).split(), normalize(answer).split()))


def best(answers: Sequence[str], score: Callable[[str], float]) -> float:
    """Maximum score over the reference answers. Raises ``ValueError`` if there are none."""
    if not (answers := check_strings("answers", answers)):
        raise ValueError("A prediction is scored against at least one reference answer, got none.")
    return max(score(answer) for answer in answers)


def _bag_f1(guess: list[str], truth: list[str]) -> float:
    if not guess or not truth:
        return float(guess == truth)
    common = (Counter(guess) & Counter(truth)).total()
    return 2 * common / (len(guess) + len(truth))
