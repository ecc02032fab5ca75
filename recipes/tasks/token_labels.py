"""Word labels (keep or drop) for training a token classifier.

Two sources:

- **Pairs** of a text and its compressed form. Words of the compressed form are aligned to the text (LLMLingua-2, arXiv
  2403.12968, algorithm 1). As in the paper, pairs with many invented words (variation rate) or unaligned words (alignment
  gap) can be filtered out.
- **Questions** with answers, those of one passage together: words of answers, content words of questions where they occur in
  the passage, and names and numbers near them are kept.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...compressors.fidelity.questions import AUX, STOP, sentences, word_set

IGNORE = -100  # label of words with unknown value
_WORD = re.compile(r"\w+(?:['’.\-,]\w+)*|[^\w\s]")
_ENDINGS = ("'s", "’s", "ing", "ed", "ies", "es", "s", "ly")
_ASKING = word_set(
    "what which who whom whose when where why how many much did does do kind type name long old according"
)
_SMALL = STOP | AUX | _ASKING | word_set("i he she they we you him them me us not no there then than so if but out up")
_LEAST_STEM = 3


@dataclass(frozen=True)
class Labels:
    """Words of a passage and their labels.

    Attributes:
        spans: ``(start, end)`` characters of each word.
        values: 1 (keep), 0 (drop) or `IGNORE` for each.
    """

    spans: tuple[tuple[int, int], ...]
    values: tuple[int, ...]

    def of_tokens(self, offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Labels of tokens, by their character offsets: the label of the word in which a token begins."""
        out, word = [], 0
        for start, end in offsets:
            while word < len(self.spans) and self.spans[word][1] <= start:
                word += 1
            inside = word < len(self.spans) and self.spans[word][0] < end
            out.append(self.values[word] if inside else IGNORE)
        return out


@dataclass(frozen=True)
class Aligned:
    """Labels of a pair, and measures of their quality.

    Attributes:
        labels: of the original's words, 0 or 1.
        variation: share of the compressed form's words that the original lacks.
        gap: share of the original's words that occur in the compressed form, minus the share labelled 1.
    """

    labels: Labels
    variation: float
    gap: float


def words_of(text: str) -> list[tuple[int, int]]:
    """Character spans of words and punctuation; 1,000.5 is one word."""
    return [match.span() for match in _WORD.finditer(text)]


def stem(word: str) -> str:
    """A word without case and common English endings."""
    word = word.casefold()
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _LEAST_STEM:
            return word[: -len(ending)].rstrip("e") or word
    return word.rstrip("e") or word


def content_stems(text: str) -> set[str]:
    """Stems of a text's words, without punctuation, function words and question words."""
    return {stem(w) for w in _WORD.findall(text) if w.casefold() not in _SMALL and w[0].isalnum()}


def alike(one: str, other: str) -> bool:
    """Whether two stems are equal, or one is a prefix of at least two thirds of the other."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    return len(short) > _LEAST_STEM and long.startswith(short) and 3 * len(short) >= 2 * len(long)


def align(original: str, compressed: str, window: int = 150) -> Aligned:
    """Labels the words of a text that its compressed form keeps.

    For each word of the compressed form, finds the nearest matching word within half a `window` of the last match, first to
    the right.
    """
    spans = words_of(original)
    source = [stem(original[a:b]) for a, b in spans]
    target = [stem(compressed[a:b]) for a, b in words_of(compressed)]
    values = [0] * len(spans)
    place = 0
    for word in target:
        for step in range(window // 2 + 1):
            near = [i for i in (place + step, place - step) if 0 <= i < len(source)]
            found = next((i for i in near if not values[i] and alike(source[i], word)), None)
            if found is not None:
                values[found], place = 1, found
                break
    in_source, in_target = set(source), set(target)
    variation = sum(not _known(word, in_source) for word in target) / max(1, len(target))
    hits = sum(_known(word, in_target) for word in source) / max(1, len(source))
    return Aligned(Labels(tuple(spans), tuple(values)), variation, hits - sum(values) / max(1, len(values)))


def _known(word: str, among: set[str]) -> bool:
    return word in among or any(alike(word, other) for other in among)


def trusted(pairs: Sequence[Aligned], variation: float = 0.05, gap: float = 0.1) -> list[int]:
    """Indices of the pairs that remain after dropping the shares with the highest variation rates, then gaps (the paper's
    shares are 5 and 10 percent)."""
    stay = sorted(range(len(pairs)), key=lambda i: (pairs[i].variation, i))
    stay = stay[: len(stay) - int(variation * len(stay))]
    stay.sort(key=lambda i: (pairs[i].gap, i))
    return sorted(stay[: len(stay) - int(gap * len(stay))])


def question_labels(passage: str, pairs: Iterable[tuple[str, str]], *, whole: int = 4, names: bool = True) -> Labels:
    """Labels of a passage's words from questions and answers about it.

    A question touches the sentence that contains its answer (the one that shares most words with the question if several do)
    and the sentence that shares most content words with it. In touched sentences, words of answers, content words of
    questions and, with ``names``, names and numbers are kept; the rest is dropped. Other sentences are ignored; with at least
    ``whole`` questions they are dropped, except names and numbers, which are ignored.
    """
    pairs = list(pairs)
    found = _look_up(passage, pairs)
    values = []
    for i, (a, _) in enumerate(found.spans):
        named = names and found.content[i] and (passage[a].isupper() or passage[a].isdigit())
        if i in found.kept:
            values.append(1)
        elif found.inside[i] in found.touched:
            values.append(int(named))
        else:
            values.append(0 if len(pairs) >= whole and not named else IGNORE)
    return Labels(tuple(found.spans), tuple(values))


def answer_labels(passage: str, question: str, answer: str, rng: random.Random, *, beside: float = 0.4) -> Labels:
    """Labels of a passage's words for one question, for a query-aware classifier.

    Keeps the words of the answer and the question's content words in the sentences that it touches (see `question_labels`).
    Other words of these sentences are kept with a probability that starts at `beside` next to the answer and halves every
    eight words; half of that for punctuation and function words. All else is dropped.
    """
    found = _look_up(passage, [(question, answer)])
    places = sorted(found.answers)
    values = []
    for i, s in enumerate(found.inside):
        chance = 0.0
        if s in found.touched:
            far = min((abs(i - p) for p in places), default=8)
            chance = beside * 0.5 ** (far / 8) * (1.0 if found.content[i] else 0.5)
        values.append(int(i in found.kept or rng.random() < chance))
    return Labels(tuple(found.spans), tuple(values))


@dataclass(frozen=True)
class _Asked:
    """Places of questions and answers in a passage.

    Attributes:
        spans, content, inside: of each word the characters, whether it is a content word, and its sentence.
        kept: words of answers, and content words of questions in touched sentences.
        answers: words of answers.
        touched: sentences that the questions touch.
    """

    spans: list[tuple[int, int]]
    content: list[bool]
    inside: list[int]
    kept: set[int]
    answers: set[int]
    touched: set[int]


def _look_up(passage: str, pairs: Sequence[tuple[str, str]]) -> _Asked:
    spans = words_of(passage)
    stems = [stem(passage[a:b]) for a, b in spans]
    content = [passage[a:b].casefold() not in _SMALL and passage[a].isalnum() for a, b in spans]
    vocabulary = {word for word, counts in zip(stems, content) if counts}
    borders = sentences(passage)
    inside = _sentence_of(spans, [a for a, _ in borders])
    members: list[list[int]] = [[] for _ in borders]
    for i, s in enumerate(inside):
        members[s].append(i)
    kept: set[int] = set()
    answers: set[int] = set()
    touched: set[int] = set()
    for question, answer in pairs:
        asked = content_stems(question)
        said_here = {word for word in vocabulary if _known(word, asked)}
        shared = {s: [i for i in part if content[i] and stems[i] in said_here] for s, part in enumerate(members)}
        overlap = {s: len({stems[i] for i in part}) for s, part in shared.items()}
        chosen = {max(overlap, key=lambda s: (overlap[s], -s))} if overlap and max(overlap.values()) else set()
        if (place := _find(passage, answer, spans, inside, overlap)) is not None:
            answers |= set(place)
            chosen |= {inside[i] for i in place}
        else:
            said = content_stems(answer)
            answers |= {i for s in chosen for i in members[s] if content[i] and stems[i] in said}
        kept |= {i for s in chosen for i in shared[s]}
        touched |= chosen
    return _Asked(spans, content, inside, kept | answers, answers, touched)


def _sentence_of(spans: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[int]:
    out, sentence = [], 0
    for a, _ in spans:
        while sentence + 1 < len(starts) and starts[sentence + 1] <= a:
            sentence += 1
        out.append(sentence)
    return out


def _find(
    passage: str, answer: str, spans: Sequence[tuple[int, int]], inside: Sequence[int], overlap: dict[int, int]
) -> list[int] | None:
    """Words of an answer in the passage, in the sentence that shares most with the question."""
    if not answer.strip():
        return None
    best: tuple[int, list[int]] | None = None
    for match in re.finditer(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", passage, re.IGNORECASE):
        place = [i for i, (a, b) in enumerate(spans) if a < match.end() and b > match.start()]
        shares = max((overlap.get(inside[i], 0) for i in place), default=0)
        if place and (best is None or shares > best[0]):
            best = (shares, place)
    return None if best is None else best[1]
