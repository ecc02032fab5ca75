"""Finds the structure of a text: JSON, tables, lists and code, by their form alone.

Only clear cases count. Anything else is prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .structure import Part, Structure
from .words import Span

_LONG_STRING = 200  # characters; a longer string in JSON is cut inside, like prose
_DECODER = json.JSONDecoder()
_JSON = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\],:]|[^\s{}\[\],:"]++')
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[^`\n]*$")
_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_ITEM = re.compile(r"([ \t]*)(?:[-*+•‣◦]|\(?\d{1,3}[.)])[ \t]+\S")
_TAG = re.compile(r"<(/?)(table|thead|tbody|tfoot|tr|ul|ol|li)\b(?:[^<>\"']|\"[^\"]*\"|'[^']*')*>", re.I)
_ITEM_TAGS = {"table": "tr", "ul": "li", "ol": "li"}
_SECTIONS = ("thead", "tbody", "tfoot")
_QUOTED = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|`[^`\n]*`")
_BRACKETS = {")": "(", "]": "[", "}": "{"}

# A line of code: what only code has (strong), what code and prose have (weak), and comments, which do not count.
_COMMENT = re.compile(r"\s*(?:#|//|/?\*|--|<!--|\"\"\"|''')")
_STRONG = re.compile(
    r"""\s*(?:
        (?:(?:async\s+)?def|class)\s+\w+.*:$ | @\w[\w.]*(?:\(.*\))?$ | import\s+[\w.*{}, ]+(?:\s+(?:as|from)\b.*)?;?$
        | from\s+[\w.]+\s+import\b.* | (?:elif|else|try|finally|except|with|while|for|if)\b.*:$
        | (?:public|private|protected|static|const|let|var|function|func|fn|struct|enum|interface|namespace)\b.*[{;(]$
        | return\b.*[;)\]\w]$ | \#include\b.* | .*[;{}]$ | [)\]}]+[,;)]*$ | .*=>.*
    )""",
    re.X,
)
_WEAK = re.compile(
    r"""\s*(?:
        [\w.\[\]"'*&>:,\ -]+?(?:[-+*/|&%]?=|:=)(?!=)\s*\S.* | [\w.>-]+\(.*\)?[,:]?$
        | (?:pass|break|continue|yield|raise)\b.* | .*[(\[\\]$
    )""",
    re.X,
)


def find_structure(text: str) -> Structure | None:
    """Finds JSON, Markdown and HTML tables, lists and code in a text; ``None`` if it is plain prose.

    JSON is a whole text, lines, or a fenced block. Code is fenced, or a whole text. Text between such blocks is prose.
    """
    found = _Finder(text)
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    root = None
    if found.is_json(start) == end:
        root = found.add_json(start, end)
    elif not found.fenced and _is_code(text) and not found.has_json():
        found.add_code(found.lines(start, end), [])
    else:
        found.scan(end)
    return Structure(text, found.parts, sorted(found.kinds), root) if found.kinds else None


class _Finder:
    """Collects the parts of one text, in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts: list[Part] = []
        self.kinds: set[str] = set()
        self.fenced = "```" in text or "~~~" in text
        self._closed: set[int] | None = None  # starts of the HTML tables and lists that end; found when needed

    def add(self, start: int, end: int, role: str = "whole", needs: Sequence[int] = (), **how: object) -> int:
        self.parts.append(Part(start, end, role, list(needs), **how))  # type: ignore[arg-type]
        return len(self.parts) - 1

    def lines(self, start: int, end: int) -> list[Span]:
        """Lines between two characters, without line breaks and white space at their ends."""
        out = []
        while start < end:
            stop = self.text.find("\n", start, end)
            stop = end if stop < 0 else stop
            out.append((start, start + len(self.text[start:stop].rstrip())))
            start = stop + 1
        return out

    def scan(self, end: int) -> None:
        """Finds all blocks, and makes what lies between them prose."""
        lines, i, prose = self.lines(0, end), 0, 0
        while i < len(lines):
            count = len(self.parts)
            after = self._block(lines, i)
            if after is None:
                i += 1
                continue
            blocks, start = self.parts[count:], self.parts[count].start
            del self.parts[count:]
            if self._prose(prose, start):
                for part in blocks:
                    part.needs = [need + 1 for need in part.needs]
            self.parts += blocks
            prose = after
            i += 1
            while i < len(lines) and lines[i][0] < after:
                i += 1
            if i and lines[i - 1][0] < after < lines[i - 1][1]:  # the rest of a line, behind HTML
                i -= 1
                lines[i] = (after, lines[i][1])
        if self.kinds:
            self._prose(prose, len(self.text))

    def _prose(self, start: int, end: int) -> bool:
        start += len(self.text[start:end]) - len(self.text[start:end].lstrip())
        end = start + len(self.text[start:end].rstrip())
        if start < end:
            self.add(start, end, "prose")
        return start < end

    def _block(self, lines: list[Span], i: int) -> int | None:
        """Adds the block that begins in a line; returns where it ends, or ``None`` if there is none."""
        a, b = lines[i]
        line = self.text[a:b]
        if not line or (a and self.text[a - 1] != "\n"):
            return self._html(a, b)
        if _FENCE.match(line):
            return self._fence(lines, i)
        start = b - len(line.lstrip())
        if (end := self.is_json(start)) and self._is_block(start, end):
            self.add_json(start, end)
            return end
        if "|" in line and i + 2 < len(lines) and self._is_table(lines, i):
            return self._table(lines, i)
        return self._list(lines, i) or self._html(a, b)

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def is_json(self, start: int) -> int | None:
        """End of the JSON object or array with content that begins at a character, if there is one."""
        if self.text[start : start + 1] not in ("{", "["):
            return None
        try:
            value, end = _DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError):
            return None
        footnote = isinstance(value, list) and len(value) == 1 and isinstance(value[0], int | float)  # such as [6]
        return end if value and not footnote else None

    def has_json(self) -> bool:
        """Whether JSON of whole lines begins at the start of a line."""
        starts = (match.start() for match in re.finditer(r"^[{\[]", self.text, re.M))
        return any((end := self.is_json(start)) and self._is_block(start, end) for start in starts)

    def _is_block(self, start: int, end: int) -> bool:
        """Whether JSON ends with its line, and is more than an array in one line."""
        stop = self.text.find("\n", end)
        data = self.text[start:end]
        return not self.text[end : None if stop < 0 else stop].strip() and ("{" in data or "\n" in data)

    def add_json(self, start: int, end: int, needs: Sequence[int] = ()) -> int:
        """Adds members and elements; returns the index of the outer bracket."""
        self.kinds.add("json")
        tokens = list(_JSON.finditer(self.text, start, end))
        root = len(self.parts)
        open_: list[int] = []  # frames of the containers around
        begin: int | None = None  # of a member: of its key
        i = 0
        while i < len(tokens):
            token, (a, b) = tokens[i].group(), tokens[i].span()
            around = open_[-1:] or needs
            how = {"joint": ","} if open_ else {}
            if token in "]}":
                self.parts[open_[-1]].needs.append(self.add(a, b, "frame", closes=True))
                open_.pop()
            elif token in "[{" and tokens[i + 1].group() not in ("]", "}"):
                open_.append(self.add(a if begin is None else begin, b, "frame", around, opens=True, **how))
                begin = None
            elif token == ",":
                begin = None
            elif token != ":":
                if token in "[{":  # empty
                    i += 1
                    b = tokens[i].end()
                elif begin is None and self.text[self.parts[open_[-1]].end - 1] == "{":
                    begin = a
                    i += 1
                    continue
                begin = a if begin is None else begin
                if token[0] == '"' and b - a > _LONG_STRING:
                    frame = self.add(begin, a + 1, "frame", around, opens=True, **how)
                    self.add(a + 1, b - 1, "string", [frame])
                    self.parts[frame].needs.append(self.add(b - 1, b, "frame", closes=True))
                else:
                    self.add(begin, b, "whole", around, **how)
                begin = None
            i += 1
        return root

    # -- code ----------------------------------------------------------------------------------------------------------

    def _fence(self, lines: list[Span], i: int) -> int:
        a, b = lines[i]
        mark = self.text[a:b].strip()
        mark = mark[: len(mark) - len(mark.lstrip(mark[0]))]
        last = next((k for k in range(i + 1, len(lines)) if self._closes(lines[k], mark)), len(lines))
        frame = self.add(a, b, "frame")
        inner = lines[i + 1 : last]
        blank = [span for span in inner if span[0] < span[1]]
        start = blank[0][0] + self._indent(blank[0]) if blank else b
        if blank and self.is_json(start) == blank[-1][1]:
            self.add_json(start, blank[-1][1], [frame])
        else:
            self.add_code(inner, [frame])
        if last == len(lines):
            return lines[-1][1]
        self.parts[frame].needs.append(self.add(*lines[last], "frame"))
        return lines[last][1]

    def _closes(self, line: Span, mark: str) -> bool:
        text = self.text[line[0] : line[1]].strip()
        return text.startswith(mark) and not text.strip(mark[0])

    def _indent(self, line: Span) -> int:
        text = self.text[line[0] : line[1]]
        return len(text) - len(text.lstrip())

    def add_code(self, lines: Sequence[Span], needs: Sequence[int]) -> None:
        """Adds the lines. A line needs the head of its block; two lines with a pair of brackets need each other."""
        self.kinds.add("code")
        heads: list[tuple[int, int]] = []  # indentation and index of the lines around
        brackets: list[tuple[str, int]] = []
        quote: tuple[str, int] | None = None  # of a string over several lines
        for a, b in lines:
            if a >= b:
                continue
            line = self.text[a:b]
            index = self.add(a, b, "whole", needs)
            if quote is None:
                depth = len(line.expandtabs()) - len(line.lstrip().expandtabs())
                while heads and heads[-1][0] >= depth:
                    heads.pop()
                self.parts[index].needs += [head for _, head in heads[-1:]]
                heads.append((depth, index))
                line, quote = self._after_strings(line, index)
                for bracket in re.findall(r"[()\[\]{}]", _QUOTED.sub("", line)):
                    if bracket not in _BRACKETS:
                        brackets.append((bracket, index))
                    elif brackets and brackets[-1][0] == _BRACKETS[bracket]:
                        self._tie(brackets.pop()[1], index)
            else:
                self.parts[index].needs.append(quote[1])
                if quote[0] in line:
                    self._tie(quote[1], index)
                    quote = None

    def _after_strings(self, line: str, index: int) -> tuple[str, tuple[str, int] | None]:
        """The line without strings in three quotes, and the one that it leaves open."""
        while mark := re.search(r'"""|\'\'\'', line):
            head, _, rest = line.partition(mark.group())
            if mark.group() not in rest:
                return head, (mark.group(), index)
            line = head + rest.partition(mark.group())[2]
        return line, None

    def _tie(self, one: int, other: int) -> None:
        if one != other:
            self.parts[one].needs.append(other)
            self.parts[other].needs.append(one)

    # -- tables and lists ------------------------------------------------------------------------------------------------

    def _is_table(self, lines: list[Span], i: int) -> bool:
        rule, row = (self.text[a:b] for a, b in lines[i + 1 : i + 3])
        return "|" in rule and bool(_RULE.match(rule)) and "|" in row

    def _table(self, lines: list[Span], i: int) -> int:
        self.kinds.add("table")
        header = self.add(*lines[i], "frame")
        self.parts[header].needs.append(self.add(*lines[i + 1], "frame"))
        end = lines[i + 1][1]
        for k in range(i + 2, len(lines)):
            a, b = lines[k]
            if "|" not in self.text[a:b]:
                break
            self.add(a, b, "whole", [header])
            end = b
        return end

    def _list(self, lines: list[Span], i: int) -> int | None:
        items: list[tuple[int, int, int]] = []  # indentation, start, end
        blank = False
        for k in range(i, len(lines)):
            a, b = lines[k]
            line = self.text[a:b]
            if item := _ITEM.match(line):
                items.append((len(item[1].expandtabs()), a, b))
            elif line and (not items or blank or _FENCE.match(line)):
                break
            elif line:
                items[-1] = (*items[-1][:2], b)
            blank = not line
        if len(items) < 2:
            return None
        self.kinds.add("list")
        heads: list[tuple[int, int]] = []
        for depth, a, b in items:
            while heads and heads[-1][0] >= depth:
                heads.pop()
            heads.append((depth, self.add(a, b, "whole", [head for _, head in heads[-1:]])))
        return items[-1][2]

    def _html(self, start: int, end: int) -> int | None:
        """Adds the HTML table or list that begins between two characters."""
        first = next((t for t in _TAG.finditer(self.text, start, end) if not t[1] and t[2].lower() in _ITEM_TAGS), None)
        if first is None or not self._closes_html(first.start()):
            return None
        wanted = _ITEM_TAGS[first[2].lower()]
        items: list[tuple[int, int, bool]] = []  # start, end, and whether it is in the head of a table
        depth, begin, head = 0, None, False
        for tag in _TAG.finditer(self.text, first.start()):
            name, closing, outer = tag[2].lower(), bool(tag[1]), depth == 1
            if name in _ITEM_TAGS:
                depth += -1 if closing else 1
            if begin is not None and outer and (not depth or name == wanted or name in _SECTIONS):
                items.append((begin, tag.end() if closing and name == wanted else tag.start(), head))
                begin = None
            if outer and name == wanted and not closing:
                begin = tag.start()
            if outer and name == "thead":
                head = not closing
            if not depth:
                return self._add_html(first.start(), tag.end(), items)
        return None

    def _closes_html(self, start: int) -> bool:
        """Whether the HTML table or list that begins at a character ends somewhere."""
        if self._closed is None:
            self._closed, open_ = set(), list[int]()
            for tag in _TAG.finditer(self.text):
                if tag[2].lower() not in _ITEM_TAGS:
                    continue
                if not tag[1]:
                    open_.append(tag.start())
                elif open_:
                    self._closed.add(open_.pop())
        return start in self._closed

    def _add_html(self, start: int, end: int, items: Sequence[tuple[int, int, bool]]) -> int | None:
        rows = []
        for a, b, head in items:
            cells = self.text[a:b].lower()
            if not (head or ("<th" in cells and "<td" not in cells)):
                rows.append((a, a + len(self.text[a:b].rstrip())))
        if not rows:
            return None
        self.kinds.add("list" if self.text[start + 1] in "uUoO" else "table")
        frame = self.add(start, rows[0][0], "frame")
        for (a, b), (stop, _) in zip(rows, [*rows[1:], (end, end)]):
            self.add(a, b, "whole", [frame], joint="")
            if self.text[b:stop].strip():
                self.parts[frame].needs.append(self.add(b, stop, "frame", joint=""))
        return end


def _is_code(text: str) -> bool:
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not _COMMENT.match(line)]
    strong = sum(bool(_STRONG.match(line)) for line in lines)
    weak = sum(bool(_WEAK.match(line)) for line in lines)
    return len(lines) >= 3 and strong >= 2 and 5 * (strong + weak) >= 3 * len(lines)
