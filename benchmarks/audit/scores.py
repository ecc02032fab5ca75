"""Scores of a reconstruction against the original passage, with bootstrap intervals.

Equation numbers are those of arXiv 2412.09165, section 5.2. Words are compared in lower case, without punctuation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from ...compressors.core.keep import keep_spans
from ...compressors.core.words import numbers, plain_words
from ...compressors.encoders.embedder import Embedder
from ..metrics import bootstrap_mean, rouge_l
from ..rows import Row

SCORES = ("recall", "token_f1", "names", "numbers", "dates", "exact", "bleu", "rouge_l", "cosine")
_MONTHS = "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
_DATE = re.compile(
    rf"\b(?:{_MONTHS}|nov(?:ember)?|dec(?:ember)?)\b|^(?:1\d|20)\d\d(?:s|\D|$)|^\d+[./-]\d+[./-]\d+$", re.I
)
_SMOOTH = SmoothingFunction().method3  # sacrebleu's default


def words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return [text[a:b].lower() for a, b in plain_words(text) if any(map(str.isalnum, text[a:b]))]


def facts(text: str) -> dict[str, list[list[str]]]:
    """The distinct names (capitalised runs), numbers and dates of a text, as lists of words."""
    data = [text[a:b] for a, b in numbers(text)]
    found = {
        "names": [text[a:b] for a, b in keep_spans(text, kinds=["names"])],
        "numbers": [word for word in data if not _DATE.search(word)],
        "dates": [word for word in data if _DATE.search(word)],
    }
    return {
        kind: [*map(list, dict.fromkeys(filter(None, (tuple(words(i)) for i in items))))]
        for kind, items in found.items()
    }


def score(original: str, guess: str) -> dict[str, float]:
    """All scores but the cosine. Kinds of facts that the original does not hold are left out.

    Returns:
        `recall`: share of the original's words in the reconstruction (a bag); `token_f1` (18); `exact`: all words in order;
        `bleu` (16), exponentially smoothed; `rouge_l`; `names`, `numbers`, `dates`: shares of them in the reconstruction,
        each as a whole.
    """
    truth, found = words(original), words(guess)
    if not truth:
        raise ValueError(f"A passage without words cannot be audited, got {original[:40]!r}.")
    common = (Counter(truth) & Counter(found)).total()
    out = {
        "recall": common / len(truth),
        "token_f1": 2 * common / (len(truth) + len(found)),
        "exact": float(truth == found),
        "bleu": float(sentence_bleu([truth], found, smoothing_function=_SMOOTH, auto_reweigh=True)) if found else 0.0,
        "rouge_l": rouge_l(found, truth),
    }
    read = f" {' '.join(found)} "
    for kind, items in facts(original).items():
        if items:
            out[kind] = sum(f" {' '.join(item)} " in read for item in items) / len(items)
    return out


def summary(originals: Sequence[str], guesses: Sequence[str], embedder: Embedder | None = None, seed: int = 0) -> Row:
    """Mean of every score over the passages that have it, with its 95 % interval as `<score>_ci_low` and `_ci_high`.

    Args:
        originals, guesses: passages and their reconstructions, in the same order.
        embedder: makes the `cosine` (17) of the two; None leaves it out.
        seed: of the bootstrap.

    Raises:
        ValueError: if they are not as many, or there are none.
    """
    if len(originals) != len(guesses) or not originals:
        raise ValueError(f"Reconstructions must be paired with passages, got {len(guesses)} and {len(originals)}.")
    each = [score(original, guess) for original, guess in zip(originals, guesses)]
    if embedder is not None:
        cosines = zip(_vectors(embedder, originals), _vectors(embedder, guesses))
        for one, (a, b) in zip(each, cosines):
            one["cosine"] = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-12))
    out: Row = {"n": len(each)}
    for name in SCORES:
        if values := [one[name] for one in each if name in one]:
            low, high = bootstrap_mean(values, seed=seed)
            out |= {name: sum(values) / len(values), f"{name}_ci_low": low, f"{name}_ci_high": high}
    return out


def _vectors(embedder: Embedder, texts: Sequence[str]) -> list:
    """One vector per text, the mean of its shards; zeros for a text without words."""
    shards = embedder.embed_shards(texts, embedder.max_tokens, [1] * len(texts))
    return [part.mean(0) if len(part) else part.new_zeros(embedder.dim) for part in shards]
