"""Structured text: the parts of JSON, tables, lists and code that stay or go as a whole, and the parts that they need.

`core.blocks.find_structure` finds them. A text without structure is cut as plain prose.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .words import Span

_ESCAPE = re.compile(r"\\u[dD][89abAB]\w\w\\u\w{4}|\\u\w{4}|\\.", re.S)  # two surrogates are one


@dataclass
class Part:
    """A stretch of a structured text.

    Attributes:
        start, end: its characters.
        role: ``"whole"``: stays or goes as a whole; ``"frame"``: stays if a part that needs it does (a header, a bracket);
            ``"prose"``: cut like plain text; ``"string"``: the same, inside a JSON string.
        needs: indices of the parts that must stay with it.
        joint: text in front of it, after another part of its block; ``None``: a line break if the source has one.
        opens: the next part follows without a joint.
        closes: it follows the previous part without a joint.
    """

    start: int
    end: int
    role: Literal["whole", "frame", "prose", "string"] = "whole"
    needs: list[int] = field(default_factory=list)
    joint: str | None = None
    opens: bool = False
    closes: bool = False


class Structure:
    """The parts of one text.

    Args:
        text: the text.
        parts: in order, without overlap; what lies between them is white space and punctuation that joints replace.
        kinds: what was found: ``"json"``, ``"table"``, ``"list"``, ``"code"``.
        root: index of the frame without which nothing of the text is valid: the outer brackets of a text that is JSON.
    """

    def __init__(self, text: str, parts: Sequence[Part], kinds: Sequence[str], root: int | None = None) -> None:
        self.text = text
        self.parts = parts
        self.kinds = tuple(kinds)
        self.root = root
        self._starts = [part.start for part in parts]
        strings = [part for part in parts if part.role == "string"]
        found = (escape for part in strings for escape in _ESCAPE.finditer(text, part.start, part.end))
        self._torn = {i for escape in found for i in range(escape.start() + 1, escape.end())}  # inside escape sequences

    def part_at(self, position: int) -> int:
        """Index of the last part that begins at or before a character; -1 before the first."""
        return bisect_right(self._starts, position) - 1

    def refine(self, units: Sequence[Span]) -> list[Span]:
        """Cuts a partition of the text at the borders of parts, too."""
        borders = {a for a, _ in units} | {end for part in self.parts for end in (part.start, part.end)}
        cuts = sorted(cut for cut in borders - self._torn if 0 < cut < len(self.text))
        return list(zip([0, *cuts], [*cuts, len(self.text)]))

    def widen(self, kept: Sequence[Span]) -> list[Span]:
        """The spans that must stay, cut at the borders of parts and grown to parts that stay as a whole."""
        found: dict[Span, None] = {}
        for a, b in kept:
            for index in range(max(self.part_at(a), 0), self.part_at(b - 1) + 1):
                part = self.parts[index]
                if a >= part.end or part.start >= b:
                    continue
                start, end = part.start, part.end
                if part.role in ("prose", "string"):
                    start, end = max(a, start), min(b, end)
                    while start in self._torn:
                        start -= 1
                    while end in self._torn:
                        end += 1
                found[start, end] = None
        return list(found)

    def units(self, fine: Sequence[Span], must: Sequence[bool]) -> tuple[list[Span], list[int], list[bool]]:
        """The units that may be kept or dropped.

        Args:
            fine: a partition of the text with every border of a part.
            must: whether each of them must stay.

        Returns:
            The units in order, the index of the part that each belongs to, and whether it must stay. A frame is a unit only
            if it must stay.
        """
        spans: list[Span] = []
        owners: list[int] = []
        marks: list[bool] = []
        for (a, b), mark in zip(fine, must):
            index = self.part_at(a)
            if index < 0 or a >= self.parts[index].end:
                continue
            role = self.parts[index].role
            if role == "whole" and owners and owners[-1] == index:
                spans[-1] = (spans[-1][0], b)
                marks[-1] = marks[-1] or mark
            elif role != "frame" or mark:
                spans.append((a, b))
                owners.append(index)
                marks.append(mark)
        return spans, owners, marks

    def merge(self, units: Sequence[tuple[Span, int]]) -> tuple[Span, ...]:
        """The kept spans: the units, given with the parts that they belong to, and all parts that these need.

        Touching ones are joined. White space goes at the ends of prose, but not in front of a line of code.
        """
        stack = [index for _, owner in units for index in self.parts[owner].needs]
        needed: set[int] = set()
        while stack:
            if (index := stack.pop()) not in needed:
                needed.add(index)
                stack += self.parts[index].needs
        whole = {(self.parts[index].start, self.parts[index].end) for index in needed}
        merged: list[Span] = []
        for a, b in sorted(whole | {span for span, _ in units}):
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else:
                merged.append((a, b))
        out = []
        for a, b in merged:
            if self.parts[self.part_at(a)].role in ("prose", "string"):
                a = min(b, b - len(self.text[a:b].lstrip()))
            b = a + len(self.text[a:b].rstrip())
            if a < b:
                out.append((a, b))
        return tuple(out)

    def join(self, spans: Sequence[Span], joiner: str) -> str:
        """The text of kept spans. Prose on one line is joined by ``joiner``."""
        text = ""
        for i, (a, b) in enumerate(spans):
            text += (self._joint(spans[i - 1][1], a, joiner) if i else "") + self.text[a:b]
        return text

    def _joint(self, end: int, start: int, joiner: str) -> str:
        left, right = self.parts[self.part_at(end - 1)], self.parts[self.part_at(start)]
        if left.opens or right.closes or start == end:
            return ""
        if left is right and left.role == "string":
            return json.dumps(joiner, ensure_ascii=False)[1:-1]
        if right.joint is not None:
            return right.joint
        lines = self.text[end:start].split("\n")
        if len(lines) == 1:
            return joiner
        return "\n" if all(line.strip() for line in lines[1:-1]) else "\n\n"


def mean_between(fine: Sequence[Span], values: Sequence[float], units: Sequence[Span]) -> list[float]:
    """The mean value of the spans of a partition that begin in each unit, or of the one that the unit begins in."""
    starts = [a for a, _ in fine]
    out = []
    for a, b in units:
        first = bisect_right(starts, a) - 1
        last = max(bisect_left(starts, b), first + 1)
        out.append(sum(values[first:last]) / (last - first))
    return out
