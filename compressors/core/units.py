"""Cuts a text into units that are kept or dropped as a whole: tokens, words, phrases or sentences, as character spans.

Units are a partition of the text; white space belongs to the unit after it. No border falls inside a visible character (an
accent, an emoji with its skin tone, a flag).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .words import Span, plain_words, whole_words, words

LEVELS = ("token", "word", "phrase", "sentence")

_PHRASE_WORDS = 8  # longest phrase, in words (or ideographs)
_STOP = re.compile(
    r"[.!?…‽]+[\"'”’)\]»]*(?=\s|$)|[。！？｡؟।॥۔]+[」』”’）)\"']*|(?=\n[^\S\n]*\n)|(?=\n[^\S\n]*(?:[-*•#]|\d{1,3}[.)])\s)"
)
_ABBREVIATIONS = """
    mr mrs ms dr prof st sen rep gov gen col lt sgt capt rev hon vs e.g i.e cf al fig figs eq no nos vol pp ed eds approx ca
    u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec
"""
# These may end a sentence; the next character decides.
_CLOSERS = "etc inc ltd co corp jr sr a.m p.m ph.d"
_FUNCTION_WORDS_EN = """
    a about above after again against all although am an and any are as at be because been before being below between both
    but by can could did do does doing down during each either few for from further had has have having he her here hers him
    his how however i if in into is it its itself just may me might more most must my neither no nor not of off on once only
    or other our out over own same shall she should since so some such than that the their them then there these they this
    those through to too under until up upon very was we were what when where whether which while who whom whose why will
    with within without would yet you your
"""
_TITLES = frozenset(_ABBREVIATIONS.split())
_FAMILIES = frozenset(_CLOSERS.split())
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_EN.split())


def split_units(text: str, level: str, offsets: Sequence[Span] = (), whole: bool = True) -> list[Span]:
    """Cuts a text into units. At every level numbers, dates, ids and addresses stay whole.

    Args:
        text: the text.
        level: ``"token"``, ``"word"``, ``"phrase"`` or ``"sentence"``.
        offsets: ``(start, end)`` characters of the text's tokens (``"token"`` only).
        whole: ``False`` divides numbers and ids, for released algorithms.

    Returns:
        Spans from 0 to ``len(text)`` without gaps; none for an empty text.

    Raises:
        ValueError: for any other level.
    """
    if level not in LEVELS:
        raise ValueError(f"A unit must be one of {LEVELS}, got {level!r}.")
    if not text:
        return []
    ends = _ends(text, level, offsets, words if whole else plain_words)
    inside = _inside_characters(text)
    torn = {i for a, b in whole_words(text) for i in range(a + 1, b)} if whole else ()
    cuts = sorted({end for end in ends if 0 < end < len(text) and end not in torn and not inside(end)})
    if cuts and not text[cuts[-1] :].strip():
        cuts.pop()  # white space at the end belongs to the last unit
    return list(zip([0, *cuts], [*cuts, len(text)]))


def _ends(text: str, level: str, offsets: Sequence[Span], find: Callable[[str], Iterator[Span]]) -> Iterator[int]:
    if level == "token":
        return _token_ends(offsets)
    if level == "sentence":
        return _sentence_ends(text)
    return _phrase_ends(text, find(text)) if level == "phrase" else (b for _, b in find(text))


def _token_ends(offsets: Sequence[Span]) -> Iterator[int]:
    reached = 0
    for start, end in offsets:
        if start >= reached:  # otherwise the token shares a character with the previous one
            yield reached
        reached = max(reached, end)


def _phrase_ends(text: str, words: Iterable[Span]) -> Iterator[int]:
    """A phrase is function words and the content words after them; punctuation and line ends close it."""
    count, content, last = 0, False, 0
    for a, b in words:
        word = text[a:b]
        function = word.lower() in FUNCTION_WORDS
        mark = not any(c.isalnum() or c == "_" for c in word)
        broken = "\n" in text[last:a]
        if count and not mark and (broken or (function and content) or count >= _PHRASE_WORDS):
            yield last
            count, content = 0, False
        count, content, last = count + 1, content or not function, b
        if mark and (last == len(text) or text[last].isspace() or not word.isascii()):
            yield last
            count, content = 0, False


def _sentence_ends(text: str) -> Iterator[int]:
    for stop in _STOP.finditer(text):
        if (
            stop.group().startswith(".")
            and not stop.group().startswith("..")
            and _abbreviates(text, stop.start(), stop.end())
        ):
            continue
        yield stop.end()


def _abbreviates(text: str, dot: int, end: int) -> bool:
    rest = text[end : end + 64].lstrip()
    if not rest:
        return False
    if rest[0].islower():
        return True
    before = re.search(r"[^\s(\[\"“]*\Z", text[max(0, dot - 24) : dot])
    word = before.group().lower() if before else ""
    if word in _FAMILIES:
        return rest[0].isdigit() or rest[0] in ",;:"
    return word in _TITLES or (len(word) == 1 and word.isalpha() and word != "i")


def _inside_characters(text: str) -> Callable[[int], bool]:
    """Returns a test whether a position falls inside a visible character."""
    flags = {i for run in re.finditer("[\U0001f1e6-\U0001f1ff]+", text) for i in range(run.start() + 1, run.end(), 2)}

    def inside(i: int) -> bool:
        before, after = text[i - 1], text[i]
        return (
            i in flags
            or "\u200d" in (before, after)  # zero-width joiner
            or unicodedata.category(after)[0] == "M"
            or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
            or "\U000e0020" <= after <= "\U000e007f"  # tags of flags
            or ("\ud800" <= before <= "\udbff" and "\udc00" <= after <= "\udfff")
            or (before == "\r" and after == "\n")
        )

    return (lambda i: text[i - 1 : i + 1] == "\r\n") if text.isascii() else inside


# -- scores --------------------------------------------------------------------------------------------------------------


def unit_scores(units: Sequence[Span], offsets: Sequence[Span], scores: Tensor) -> Tensor:
    """Mean score of each unit's tokens; a token in several units is divided by characters.

    Args:
        units: a partition of the text.
        offsets: ``(start, end)`` characters of the tokens.
        scores: ``[tokens]``.

    Returns:
        ``[units]`` float64; 0 for a unit without tokens.
    """
    length = units[-1][1] if units else 0
    if not length or not len(offsets):
        return torch.zeros(len(units), dtype=torch.float64)
    spans = torch.tensor(offsets, dtype=torch.long).clamp(max=length)
    start = spans[:, 0].clamp(max=length - 1)
    end = torch.maximum(spans[:, 1], start + 1)
    # Score and number of tokens per character, as differences at the tokens' ends.
    per_character = torch.stack([scores.double(), torch.ones_like(scores, dtype=torch.float64)], dim=1)
    per_character = per_character / (end - start)[:, None]
    steps = torch.zeros(length + 1, 2, dtype=torch.float64)
    steps.index_add_(0, start, per_character).index_add_(0, end, -per_character)
    upto = torch.cat([torch.zeros(1, 2, dtype=torch.float64), steps[:-1].cumsum(0).cumsum(0)])
    borders = torch.tensor(units)
    total, tokens = (upto[borders[:, 1]] - upto[borders[:, 0]]).unbind(1)
    return torch.where(tokens > 1e-6, total / tokens.clamp(min=1e-6), 0.0)


def tokens_in(units: Sequence[Span], offsets: Sequence[Span]) -> list[int]:
    """Counts the tokens that begin in or right behind each unit; ``offsets`` are their ``(start, end)`` characters."""
    if not units:
        return []
    starts = torch.tensor([a for a, _ in units])
    first = torch.tensor([a for a, _ in offsets], dtype=torch.long)
    found = (torch.searchsorted(starts, first, right=True) - 1).clamp(min=0)
    return torch.bincount(found, minlength=len(units)).tolist()


# -- what must stay ------------------------------------------------------------------------------------------------------


def carve(units: Sequence[Span], kept: Sequence[Span], text: str) -> tuple[list[Span], list[int], list[bool]]:
    """Makes each span that must stay a unit of its own.

    Args:
        units: a partition of the text.
        kept: spans that must stay, in order, without overlap.
        text: the text.

    Returns:
        The finer partition; per unit the index of its original unit (for a kept one: the unit it begins in); and whether it
        must stay.
    """
    inside = _inside_characters(text)
    grown: list[Span] = []
    for a, b in kept:
        while 0 < a < len(text) and inside(a):
            a -= 1
        while 0 < b < len(text) and inside(b):
            b += 1
        if not grown or a >= grown[-1][1]:
            grown.append((a, b))
        else:
            grown[-1] = (grown[-1][0], max(b, grown[-1][1]))
    covered = {i for a, b in grown for i in range(a + 1, b)}
    borders = {a for a, _ in units} | {end for span in grown for end in span}
    cuts = sorted(c for c in borders if 0 < c < len(text) and c not in covered)
    spans = list(zip([0, *cuts], [*cuts, len(text)])) if text else []
    starts = {a for a, _ in grown}
    parents, must, index = [], [], 0
    for a, _ in spans:
        while index + 1 < len(units) and units[index + 1][0] <= a:
            index += 1
        parents.append(index)
        must.append(a in starts)
    return spans, parents, must
