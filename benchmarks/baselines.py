"""Plain-text baselines under the same number of reader tokens.

Each turns a question and passages into shorter texts whose whole prompt takes at most `budget` positions, those of the
compressed method's prompt for the same question. All are deterministic under a seed.
"""

from __future__ import annotations

import bisect
import functools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from ..compressors import Reader
from ..compressors.core.textfiles import check_strings
from ..compressors.encoders.embedder import MINILM, Embedder, load_embedder
from ..recipes.data.templates import question_prompt

Baseline = Callable[[Reader, str, Sequence[str], int, random.Random], list[str]]
Scorer = Callable[[str, Sequence[str]], list[float]]

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


def truncate(reader: Reader, question: str, passages: Sequence[str], budget: int, rng: random.Random) -> list[str]:
    """The first tokens of every passage, equally many of each, as many as fit."""
    passages = check_strings("passages", passages)
    cuts = [[end for _, end in reader.tokenize_with_offsets(passage)[1]] for passage in passages]

    def kept(n: int) -> list[str]:
        return [p if n >= len(ends) else p[: ends[n - 1]] for p, ends in zip(passages, cuts) if n and ends]

    return kept(_largest(max(map(len, cuts), default=0), lambda n: _fits(reader, kept(n), question, budget)))


def fewer_passages(
    reader: Reader, question: str, passages: Sequence[str], budget: int, rng: random.Random
) -> list[str]:
    """The whole passages closest to the question by BM25 that fit, in their order; if none fits, the head of the closest."""
    return _best_units(reader, question, list(enumerate(check_strings("passages", passages))), budget, rng, bm25)


def extract(reader: Reader, question: str, passages: Sequence[str], budget: int, rng: random.Random) -> list[str]:
    """The sentences closest to the question by BM25 that fit, in their order."""
    return _best_units(reader, question, _sentences(passages), budget, rng, bm25)


def extract_embedder(
    reader: Reader, question: str, passages: Sequence[str], budget: int, rng: random.Random
) -> list[str]:
    """The sentences closest to the question by all-MiniLM-L6-v2 that fit, in their order.

    Raises ImportError if sentence-transformers is not installed.
    """
    return _best_units(reader, question, _sentences(passages), budget, rng, cosine)


def random_tokens(reader: Reader, question: str, passages: Sequence[str], budget: int, rng: random.Random) -> list[str]:
    """Random tokens of all passages, in their order."""
    passages = check_strings("passages", passages)
    tokens = [(i, start, end) for i, p in enumerate(passages) for start, end in reader.tokenize_with_offsets(p)[1]]
    order = rng.sample(range(len(tokens)), len(tokens))

    def kept(n: int) -> list[str]:
        texts: dict[int, str] = {}
        for i, start, end in (tokens[k] for k in sorted(order[:n])):
            texts[i] = texts.get(i, "") + passages[i][start:end]
        return list(texts.values())

    return kept(_largest(len(tokens), lambda n: _fits(reader, kept(n), question, budget)))


BASELINES: dict[str, Baseline] = {
    "truncate": truncate,
    "fewer-passages": fewer_passages,
    "extract": extract,
    "extract-embedder": extract_embedder,
    "random-tokens": random_tokens,
}


def split_sentences(text: str) -> list[str]:
    """Sentences by a plain rule: an end mark, space, then a capital or a digit. Stripped, none empty."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [part for a, b in zip([0, *ends], [*ends, len(text)]) if (part := text[a:b].strip())]


def bm25(question: str, texts: Sequence[str]) -> list[float]:
    """BM25 (k1 = 1.2, b = 0.75) of each text against the question, with document frequencies from the texts themselves.

    Robertson and Zaragoza, 2009, https://doi.org/10.1561/1500000019.
    """
    bags = [Counter(_words(text)) for text in check_strings("texts", texts)]
    mean = sum(bag.total() for bag in bags) / max(len(bags), 1) or 1.0
    present = Counter(word for bag in bags for word in bag)
    asked = set(_words(question))

    def rarity(word: str) -> float:
        return math.log(1 + (len(bags) - present[word] + 0.5) / (present[word] + 0.5))

    def score(bag: Counter[str]) -> float:
        damping = 1.2 * (0.25 + 0.75 * bag.total() / mean)
        return sum(rarity(word) * 2.2 * bag[word] / (bag[word] + damping) for word in sorted(asked & bag.keys()))

    return [score(bag) for bag in bags]


def cosine(question: str, texts: Sequence[str]) -> list[float]:
    """Cosine of each text and the question by all-MiniLM-L6-v2, which reads the first 254 tokens of a text."""
    vectors = _minilm().embed([question, *check_strings("texts", texts)])
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return [float(x) for x in vectors[1:] @ vectors[0]]


@functools.cache
def _minilm() -> Embedder:
    return load_embedder(MINILM)


def _sentences(passages: Sequence[str]) -> list[tuple[int, str]]:
    return [
        (i, sentence)
        for i, passage in enumerate(check_strings("passages", passages))
        for sentence in split_sentences(passage)
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _best_units(
    reader: Reader, question: str, units: Sequence[tuple[int, str]], budget: int, rng: random.Random, scorer: Scorer
) -> list[str]:
    """The best-ranked (passage, text) units that fit, those of one passage joined; else the head of the best one."""
    scores = scorer(question, [text for _, text in units])
    ranked = sorted(range(len(units)), key=lambda i: -scores[i])
    chosen: list[int] = []
    for i in ranked:
        trial = sorted([*chosen, i])
        if _fits(reader, _joined([units[k] for k in trial]), question, budget):
            chosen = trial
    kept = _joined([units[k] for k in chosen])
    return kept or truncate(reader, question, [units[i][1] for i in ranked[:1]], budget, rng)


def _joined(units: Sequence[tuple[int, str]]) -> list[str]:
    texts: dict[int, str] = {}
    for passage, text in units:
        texts[passage] = f"{texts[passage]} {text}" if passage in texts else text
    return list(texts.values())


def _fits(reader: Reader, pieces: Sequence[str], question: str, budget: int) -> bool:
    return reader.length(question_prompt(pieces, question)) <= budget


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 0..limit that fits, if lengths grow with n; else some n that fits."""
    n = bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))
    while n and not fits(n):
        n -= 1
    return n
