"""Makes questions from any paragraph by rule: cloze, wh-in-place, fronted and noisy ones.

Training and the fidelity gate use them. A pattern finds an answer candidate (a date, number, name, quoted title or noun
phrase); its clause becomes a question with a wh-word for its kind. The questions are often ungrammatical, but their words
point at the answer's place. They are deterministic given a `random.Random`. Noisy cloze questions follow Lewis et al. 2019
(Unsupervised Question Answering by Cloze Translation).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What a reader reads after a passage to answer a question, and to repeat the passage.
ASKED = "\n\nQuestion: {question}\nAnswer:"
REPEAT = "\nRepeat the passage:\n"


def word_set(text: str) -> frozenset[str]:
    """The words of a string as a set."""
    return frozenset(text.split())


MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = re.compile(rf"\b(?:(?:\d{{1,2}} )?(?:{MONTHS})(?: \d{{1,2}}\b)?(?:,? \d{{4}})?|1[0-9]{{3}}s?|20[0-2]\d)\b")
NUMBER = re.compile(
    r"(?<![\w.,$])\$?\d[\d,]*(?:\.\d+)?(?:%| percent| per cent| million| billion)?(?![\w%])"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty)\b"
)
NAME = re.compile(
    r"\b[A-Z][\w’'.-]*[\w](?: (?:(?:of|the|de|la|von|van|and|for) ){0,2}(?:[A-Z][\w’'-]*\w|[A-Z]\.)){0,4}"
)
QUOTED = re.compile(r"[\"“]([^\"”]{3,40})[\"”]")
THING = re.compile(
    r"\b(?:the|a|an|its|his|her|their|of|with|as|by|for|and|into|from) ((?:[a-z]{3,} ){0,2}[a-z]{4,})"
    r"(?=[,.;:)]| (?:of|in|and|to|from|by|at|on|for|with|that|which|who|was|were|is|are|as|or|had|has)\b)"
)
PHRASE = re.compile(r"\b(?:to|because|by|after|when|for|that|with|as) ((?:[a-z’'-]+ ){1,6}[a-z’'-]+)(?=[,.;])")
SENTENCE = re.compile(r"(?<=[a-z0-9)\]\"”][.!?])\s+(?=[A-Z\"“])|(?<=\.[\"”])\s+(?=[A-Z])")
CLAUSE = re.compile(r"(?<=[,;:)]) | (?=(?:and|but|while|which|who|that|because|although|where|when|after|before) )")
COMMON = word_set(
    "The A An In On At It He She They We I You This That These Those His Her Its Their Our There Here As By For From "
    "With Without While When Where Which Who What Why How If But And Or Not No Although Though Because Since After "
    "Before During Many Most Some Several Other Another Each All Both One Two Three First Second Later Also However "
    "Under Over Between Among According Despite Due To Of Then Thus Such Only Even Once Until Upon Through Following "
    "Today More Much My Your Every Like Unlike So Yet Instead"
)
AUX = word_set("was were is are had has have can could will would did does do may might must should")
PERSON = word_set(
    "John William James George Charles Thomas Robert Henry David Edward Joseph Paul Richard Michael Peter Frank Mary "
    "Elizabeth Anne Louis Alexander Arthur Samuel Albert Francis Daniel Martin Jean Philip Walter Harry Frederick "
    "Andrew Benjamin Stephen Alfred Jack Anthony Margaret Sarah Jane Tom Hugh Simon Adam Karl Maria Catherine Victoria "
    "Alice Helen Johann Friedrich Otto Hans Jacob Isaac Abraham Roger Patrick Christopher Kevin Brian Mark Steven Eric "
    "King Queen Prince Princess President Sir Lord Pope Emperor Saint St Dr Mr Mrs General Captain Professor"
)
PLACE = word_set("in at from near to into across through around outside")
GROUP = word_set(
    "University College School Company Corporation Party Church Museum Army Navy League Club Institute Council Court "
    "Act Treaty War Battle Award Prize River Lake Mountain Island Bridge Street Park Airport Station Railway Band Bank "
    "Empire Kingdom Republic Union Society Association Committee Library Theatre Festival Cup Championship"
)
STOP = word_set(
    "the a an of in on at to and or for with by from as that which was were is are it its his her their this these "
    "be been had has have"
)


@dataclass(frozen=True)
class Span:
    """An answer candidate: characters ``start`` to ``end`` of the paragraph, and its kind."""

    start: int
    end: int
    kind: str  # date | number | name | title | thing | phrase


def find_spans(paragraph: str) -> list[Span]:
    """Finds the answer candidates of a paragraph, in order and without overlap; dates win over names, names over phrases."""
    taken: list[Span] = []

    def take(start: int, end: int, kind: str) -> None:
        if end - start >= 1 and all(end <= span.start or start >= span.end for span in taken):
            taken.append(Span(start, end, kind))

    for match in DATE.finditer(paragraph):
        if match.group() not in ("May", "March") or match.end() - match.start() > 5:
            take(*match.span(), "date")
    for match in NUMBER.finditer(paragraph):
        take(*match.span(), "number")
    for match in QUOTED.finditer(paragraph):
        take(*match.span(1), "title")
    for match in NAME.finditer(paragraph):
        start, end = match.span()
        first = match.group().split(" ", 1)[0]
        if first in COMMON:
            start += len(first) + 1
        text = paragraph[start:end]
        while text and not text[0].isupper():  # "The of the ..." leaves small words at the front
            word = text.split(" ", 1)[0]
            start += len(word) + 1
            text = paragraph[start:end]
        if len(text) > 2 and text not in COMMON:
            take(start, end, "name")
    for match in PHRASE.finditer(paragraph):
        take(*match.span(1), "phrase")
    for match in THING.finditer(paragraph):
        if match.group(1).split(" ", 1)[0] not in STOP:
            take(*match.span(1), "thing")
    return sorted(taken, key=lambda span: span.start)


def sentences(paragraph: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of a paragraph."""
    bounds, start = [], 0
    for match in SENTENCE.finditer(paragraph):
        bounds.append((start, match.start()))
        start = match.end()
    bounds.append((start, len(paragraph)))
    return [(a, b) for a, b in bounds if b > a]


def wh_words(answer: str, kind: str, before: str, after: str, rng: random.Random) -> str:
    """A wh-phrase for an answer between the texts ``before`` and ``after``."""
    last = before.split()[-1].lower() if before.split() else ""
    words = answer.split()
    if kind == "date":
        return rng.choice(["When", "When", "What year" if answer[:4].isdigit() else "On what date", "In what year"])
    if kind == "number":
        if answer.endswith(("%", "percent", "per cent")):
            return "What percentage"
        if answer.startswith("$"):
            return "How much"
        noun = after.split()[0].strip(",.;:()") if after.split() else ""
        return f"How many {noun}" if noun.isalpha() and noun not in STOP else rng.choice(["How many", "What number"])
    if kind == "name":
        group = next((word for word in reversed(words) if word in GROUP), None)
        if group:
            return rng.choice([f"What {group.lower()}", f"Which {group.lower()}", "What"])
        if any(word in PERSON for word in words):
            return "Who"
        if last in PLACE:
            return rng.choice(["Where", "Where", "What place", "What city", "What country"])
        return (
            rng.choice(["Who", "Who", "What", "Which"])
            if last in ("", "by", "and", "with")
            else rng.choice(["Who", "What", "What", "Which"])
        )
    if kind == "title":
        return rng.choice(["What", "What is the name of", "Which", "What is called"])
    if kind == "phrase":
        return {"because": "Why", "to": rng.choice(["Why", "What"]), "by": "How", "after": "When", "when": "When"}.get(
            last, rng.choice(["What", "How", "Why"])
        )
    return rng.choice(["What", "What", "What", "Which", "What kind of"])


def clause_around(paragraph: str, span: Span, rng: random.Random) -> tuple[str, str]:
    """The text left and right of the span: its clause if long enough, else its sentence."""
    left_end, right_end = next(((a, b) for a, b in sentences(paragraph) if a <= span.start < b), (0, len(paragraph)))
    left, right = paragraph[left_end : span.start], paragraph[span.end : max(right_end, span.end)]
    if rng.random() < 0.6:
        short_left = CLAUSE.split(left)[-1]
        short_right = CLAUSE.split(right)[0] if right else ""
        if len((short_left + short_right).split()) >= 4:
            left, right = short_left, short_right
        elif len((short_left + right).split()) < len((left + short_right).split()):
            left = short_left
        else:
            right = short_right
    limit = rng.randint(6, 14)
    return " ".join(left.split()[-limit:]), " ".join(right.split()[:limit])


def tidy(question: str) -> str:
    """Normalises spaces and punctuation and ends with a question mark."""
    question = re.sub(r"[\"“”()\[\]]", "", question)
    question = re.sub(r"\s+([,.;:?!])", r"\1", " ".join(question.split()))
    return question.strip(" ,.;:-–—?!") + "?"


def drop_words(words: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """Drops about ``share`` of the words, small words more often."""
    return [word for word in words if rng.random() >= share * (1.5 if word.lower() in STOP else 0.7)]


def make_question(paragraph: str, span: Span, rng: random.Random) -> str | None:
    """Makes a question with the span as its answer; ``None`` if the sentence has too few other words."""
    answer = paragraph[span.start : span.end]
    left, right = clause_around(paragraph, span, rng)
    wh = wh_words(answer, span.kind, left, paragraph[span.end : span.end + 40], rng)
    words_left, words_right = left.split(), right.split()
    if wh.startswith("How many ") and words_right:
        words_right = words_right[1:]
    if len([word for word in words_left + words_right if word.lower().strip(",.;:") not in STOP]) < 2:
        return None
    style = rng.random()
    if not words_left or (style < 0.15 and len(words_right) >= 4):
        body = [wh, *drop_words(words_right, rng.choice([0, 0, 0.2]), rng)]
    elif style < 0.3:
        body = [*words_left, wh.lower() if wh not in ("Where", "When", "Why") else "what", *words_right]
    else:
        if wh in ("When", "Where", "Why", "How", "What year", "On what date") and len(words_left) > 2:
            words_left = (
                words_left[:-1] if words_left[-1].lower() in PLACE | {"on", "since", "until", "by"} else words_left
            )
        body = [wh, *front_auxiliary(words_left, rng), *words_right]
        if style > 0.6:
            noisy = drop_words(body[1:], rng.choice([0.1, 0.25, 0.4]), rng)
            body = [wh, *(noisy if len(noisy) >= 3 else body[1:])]
    question = tidy(" ".join(body))
    if answer.lower() in question.lower() or len(question.split()) < 3:
        return None
    question = question[0].upper() + question[1:]
    return question.lower() if rng.random() < 0.08 else question


def front_auxiliary(words: list[str], rng: random.Random) -> list[str]:
    """`Tesla was born` -> `was Tesla born`; without an auxiliary `did Tesla moved` (the verb is unchanged)."""
    for index, word in enumerate(words[:7]):
        if word in AUX:
            subject = [lower_first(words[0]), *words[1:index]] if index else []
            return [word, *subject, *words[index + 1 :]]
    helper = ["did"] if rng.random() < 0.7 else []
    return [*helper, lower_first(words[0]), *words[1:]] if words else helper


def lower_first(word: str) -> str:
    """Lowercases words that are capitalised only at the start of a sentence."""
    return word[0].lower() + word[1:] if word in COMMON and word != "I" else word


def make_questions(paragraph: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Makes at most ``count`` pairs (question, answer); each answer is a literal part of the paragraph."""
    spans = find_spans(paragraph)
    weight = {"name": 1.0, "date": 1.0, "number": 1.0, "title": 0.8, "thing": 0.55, "phrase": 0.6}
    order = sorted(spans, key=lambda span: rng.random() ** (1 / weight[span.kind]), reverse=True)
    pairs: list[tuple[str, str]] = []
    for span in order:
        if len(pairs) >= count:
            break
        if question := make_question(paragraph, span, rng):
            pairs.append((question, paragraph[span.start : span.end]))
    return pairs
