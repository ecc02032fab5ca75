"""Reads text files and JSON lines: plain, ``.xz`` or ``.gz``, with or without byte-order marks. Errors name file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

LINES = (".jsonl", ".ndjson")
TEXTS = (".txt", ".md")
PACKED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
BYTE_ORDER_MARK = "\ufeff"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of other bytes

Row = TypeVar("Row", bound=BaseModel)


def kind_of(path: Path) -> str:
    """The file's ending in lower case, without that of its compression: ``.jsonl`` for ``A.JSONL.xz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def read_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file with their ends, without byte-order marks at their starts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}." if not path.is_dir() else f"{path} is a folder, not a file."
        )
    number = 0
    opener = PACKED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                number += 1
                if _NOT_UTF8.search(line):
                    raise ValueError(f"{path}, line {number} is not UTF-8 text; convert the file.")
                yield line.removeprefix(BYTE_ORDER_MARK)  # concatenated files have more than one
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked after line {number}: {error}.") from error


def read_text(path: str | Path) -> str:
    """The text of a file; see `read_lines`."""
    return "".join(read_lines(path))


def read_json_lines(path: str | Path) -> Iterator[tuple[int, str, Any]]:
    """Yields ``(number, where, value)`` of every line that is not blank; ``where`` names file and line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not JSON, is nested too deeply, or holds a number with too many digits.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, where, parse_json(line, where)


def parse_json(text: str, where: str) -> Any:
    """Parses JSON; ValueError names ``where``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{where} cannot be read: its JSON is nested too deeply.") from error
    except ValueError as error:
        most = sys.get_int_max_str_digits()
        raise ValueError(f"{where} cannot be read: it holds a number of more than {most} digits.") from error


def parse_row(model: type[Row], row: Any, where: str) -> Row:
    """Checks a row; ValueError names ``where``, and per problem the field, what is wrong and the value."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(row)}.")
    try:
        return model.model_validate(row)
    except ValidationError as error:
        details = error.errors()
    missing = [".".join(map(str, d["loc"])) for d in details if d["type"] == "missing"]
    clauses = [f"lacks {', '.join(missing)}"] if missing else []
    clauses += [f"has {_problem(dict(detail))}" for detail in details if detail["type"] != "missing"]
    raise ValueError(f"{where} {'; '.join(clauses)}.")


def _problem(detail: dict[str, Any]) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{'.'.join(map(str, detail['loc'])) or 'a problem'}={shown(detail['input'])}: {message}"


def shown(value: Any) -> str:
    """A value for an error message, cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check_strings(name: str, values: Iterable[str], what: str = "strings") -> list[str]:
    """The strings as a list; TypeError for a single string or anything else, since a string is never a list of letters."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{name} must be a list of {what}, got one string; write [{name}].")
    try:
        found = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of {what}, got {type(values).__name__}.") from None
    for number, value in enumerate(found):
        if not isinstance(value, str):
            raise TypeError(f"{name} must hold strings; number {number} is a {type(value).__name__}.")
    return found
