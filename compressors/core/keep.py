"""What must stay of a passage: settings that every method with a budget shares, and the kinds of words they name."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .units import FUNCTION_WORDS, Span, split_units
from .words import numbers, words

_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(
    r"[A-Za-z][A-Za-z\d+.\-]{1,20}://\S|www\.\S|mailto:\S"
    r"|(?:[\w-]+\.)+(?:com|org|net|edu|gov|info|io|dev|ai|app|co|uk|de|fr|eu|example)(?:[/?#:].*)?\Z"
)
_MONEY = re.compile(
    r"[$¢£¤¥€₹₽₩₪₫₺₴₿￥￡]|[円圆元]|\b(?:(?<!per )cents?|dollars?|[Ee]uros?|pence|penny|yen|yuan|rupees?|francs?|zł|kr|Kč|Ft"
    r"|lei|лв|Rs|Rp|RM|FCFA|XOF|XAF|USD|EUR|GBP|JPY|CHF|CNY|RMB|INR|AUD|CAD|NZD|SEK|NOK|DKK|PLN|CZK|HUF|RON|BGN|RUB|UAH|TRY|ILS|AED"
    r"|SAR|EGP|ZAR|NGN|KES|BRL|MXN|ARS|CLP|COP|PEN|KRW|TWD|HKD|SGD|THB|IDR|MYR|PHP|VND|PKR|BDT|BTC|ETH)\b"
)
_YEAR = r"['’]?(?:1\d|20)?\d\ds|(?:1\d|20)\d\d"
_MONTH = r"\b(?:Jan|Feb|Mar|Apr|May|Mai|Jun|Jul|Aug|Sep|Oct|Okt|Nov|Dec|Dez)[a-z]*\b"
_DATE = re.compile(
    rf"(?:{_YEAR})(?:\s?[-–—/]\s?(?:{_YEAR}|\d\d))?\Z|\d{{4}}-(?:\d\d?-\d\d?|W\d\d)|\d{{8}}T"
    r"|\d{1,2}[./]\s?\d{1,2}[./]\s?\d{2,4}\b|\d{2,4}年"
    r"|\d{1,2}:\d\d(?::\d\d|\s?[AaPp]\.?[Mm]|Z|\b)|\d{1,2} [AaPp]\.?[Mm]\b|[QH][1-4] [12]\d{3}"
    rf"|\d+ (?:B\.?C\.?|A\.?D\.?|B?CE)(?!\w)|.*{_MONTH}|\d{{1,2}}\.? (?:de )?[^\W\d]{{3,10}}\.? (?:de )?[12]\d{{3}}\Z"
)
_ID = re.compile(
    r"\A[#№]\d|0x[\da-fA-F]+\Z|[\da-fA-F]{8}-[\da-fA-F]{4}-|\A(?:[\da-fA-F]{0,4}:){2,}|\b10\.\d{4,}/|\d[A-Z]+\d|[=<>]=\d"
    r"|(?<![\dA-Za-z°µ])(?!c?k?m[23]\b)[A-Za-z][A-Za-z_]*[-_./:&]?\d|[A-Za-z]_\w*\d"  # letters, then digits
    r"|\A[A-ZÄÖÜ]{1,5}[ \-](?:[A-Z]{1,2} )?\d|\A\d{5,}\Z|\b\d{1,3}(?:\.\d{1,3}){3}\b|\A\+\d{1,3} "
)
_GROUPS = re.compile(r"\+?\(?\d+\)?(?:[ \-./:]\(?\d+\)?){2,}")  # telephone, ISBN, payment card
_NO_ID = re.compile(
    r"\d{1,3}(?:[., \u00a0\u202f]\d{3})+(?:[.,]\d+)?(?![ \-./:]?\d)|\d+ \d+/\d+\Z"
)  # thousands, fractions


def _of_words(test: Callable[[str], bool]) -> Callable[[str], Iterator[Span]]:
    return lambda text: ((a, b) for a, b in words(text) if test(text[a:b]))


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _is_address(word: str) -> bool:
    return bool(_EMAIL.match(word) or _URL.match(word))


def _is_date(word: str) -> bool:
    return _has_digit(word) and bool(_DATE.match(word)) and not _is_address(word)


def _is_money(word: str) -> bool:
    return _has_digit(word) and bool(_MONEY.search(word)) and not _is_address(word)


def _is_id(word: str) -> bool:
    if not _has_digit(word) or _is_date(word) or _is_money(word) or _is_address(word):
        return False
    return bool(_ID.search(word) or (_GROUPS.match(word) and not _NO_ID.match(word)))


def _names(text: str) -> Iterator[Span]:
    """Runs of capitalised words, except a single one that opens a sentence."""
    opens = set()
    for a, b in split_units(text, "sentence"):
        opens.add(b - len(text[a:b].lstrip(" \t\r\n\"'“‘(")))
    run: list[Span] = []

    def flush() -> Iterator[Span]:
        if run and (len(run) > 1 or run[0][0] not in opens or text[run[0][0] : run[0][1]].isupper()):
            yield run[0][0], run[-1][1]
        run.clear()

    for a, b in words(text):
        if run and text[run[-1][1] : a] != " ":
            yield from flush()
        if text[a].isupper() and text[a:b].lower() not in FUNCTION_WORDS:
            run.append((a, b))
        else:
            yield from flush()
    yield from flush()


# Finds the words of each kind that `keep` may name.
KINDS: dict[str, Callable[[str], Iterator[Span]]] = {
    "numbers": numbers,
    "dates": _of_words(_is_date),
    "names": _names,
    "ids": _of_words(_is_id),
    "emails": _of_words(lambda word: bool(_EMAIL.match(word)) or word.startswith("mailto:")),
    "urls": _of_words(lambda word: bool(_URL.match(word)) and not _EMAIL.match(word)),
    "money": _of_words(_is_money),
}


@dataclass(kw_only=True)
class KeepSettings:
    """Config mixin: the words of a passage that a method keeps before all others. They count against the budget."""

    keep: tuple[str, ...] = field(
        default=(),
        metadata={"help": f"what stays: kinds of words ({', '.join(KINDS)}), and strings with the words around them"},
    )
    keep_patterns: tuple[str, ...] = field(
        default=(), metadata={"help": "regular expressions: the words around their matches stay"}
    )
    keep_digits: bool = field(default=False, metadata={"help": "numbers stay, as with the kind 'numbers'"})
    keep_names: bool = field(default=False, metadata={"help": "capitalised names stay, as with the kind 'names'"})

    def check_keep(self) -> None:
        """Makes the lists tuples. Raises ``ValueError`` for anything but non-empty strings and valid expressions."""
        for name in ("keep", "keep_patterns"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} must be a list of non-empty strings, got {value!r}.")
            setattr(self, name, tuple(value))
        for pattern in self.keep_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"keep_patterns holds {pattern!r}, no valid regular expression: {error}.") from error

    @property
    def keeps(self) -> bool:
        """Whether anything must stay."""
        return bool(self.keep or self.keep_patterns or self.keep_digits or self.keep_names)

    def kept_spans(self, text: str) -> list[Span]:
        """``(start, end)`` characters of a text that must stay, in order, without overlap."""
        kinds = [kind for kind in KINDS if kind in self.keep]
        strings = [one for one in self.keep if one not in KINDS]
        kinds += ["numbers"] * self.keep_digits + ["names"] * self.keep_names
        return keep_spans(text, strings, self.keep_patterns, kinds)


def keep_spans(
    text: str, strings: Iterable[str] = (), patterns: Iterable[str] = (), kinds: Iterable[str] = ()
) -> list[Span]:
    """Finds the words that must stay: around strings and matches of regular expressions, and those of some kinds.

    Args:
        text: the text.
        strings: literal strings, case-sensitive.
        patterns: regular expressions.
        kinds: names in `KINDS`.

    Returns:
        Spans in order, without overlap.
    """
    expressions = [re.compile(re.escape(s)) for s in strings] + [re.compile(p) for p in patterns]
    found = [m.span() for expression in expressions for m in expression.finditer(text) if m.group().strip()]
    found = _grown(found, text) if found else []
    for kind in kinds:
        found += KINDS[kind](text)
    merged: list[Span] = []
    for a, b in sorted(found):
        if merged and a < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _grown(spans: Sequence[Span], text: str) -> list[Span]:
    """The spans with the rest of the words that they begin or end in."""
    found = list(words(text))
    starts, ends = [a for a, _ in found], [b for _, b in found]
    grown = []
    for a, b in spans:
        first, last = bisect_right(ends, a), bisect_left(starts, b) - 1
        grown.append((min(a, starts[first]), max(b, ends[last])) if first <= last else (a, b))
    return grown
