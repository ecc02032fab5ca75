"""Results files: JSON lines, one row per measurement, with the command that made it.

A figure that could not be measured is absent from its row.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, create_model

from ..compressors.core.textfiles import parse_row, read_json_lines

if TYPE_CHECKING:
    from ..compressors import Compressor, Reader

Row = dict[str, Any]

PACKAGE = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


# types of the entries that tables and reports read; further entries are free
TEXTS = (
    "suite", "test", "dataset", "half", "method", "interface", "budget_of", "sending", "allocation", "score", "reader",
    "device", "dtype",
)  # fmt: skip
NUMBERS = (
    "n", "passages", "position", "temperature", "ratio", "ratio_asked", "reader_tokens", "context_asked", "context_tokens",
    "batch", "em", "f1", "containment", "rouge_l", "f1_ci_low", "f1_ci_high", "ttft_ms", "decode_ms_per_token",
)  # fmt: skip
_FIELDS: dict[str, Any] = {"level": (str | float | None, None)}
_FIELDS |= dict.fromkeys(TEXTS, (str | None, None)) | dict.fromkeys(NUMBERS, (float | None, None))
ResultRow = create_model("ResultRow", __config__=ConfigDict(strict=True, extra="allow"), **_FIELDS)


def append_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Append rows in a single write, so that readers and crashes see all of them or none.

    None, NaN and infinite entries are left out. Raises ValueError for rows that JSON cannot hold.
    """
    path = Path(path)
    try:
        lines = [json.dumps(clean(row), ensure_ascii=False, allow_nan=False) for row in rows]
    except TypeError as error:
        raise ValueError(f"A results row for {path} holds something JSON cannot express: {error}.") from error
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, ("\n" * torn + "\n".join(lines) + "\n").encode())
    finally:
        os.close(handle)


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[Row]:
    """Read the rows of results files in order; a folder stands for its `*.jsonl` files."""
    rows: list[Row] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for _, where, row in read_json_lines(file):
                parse_row(ResultRow, row, where)
                rows.append(row)
    return rows


def paired(rows: Sequence[Row]) -> list[Row]:
    """The rows that can be compared: for each question set those of its newest reader, on the questions of most lines.

    The newest reader is that of the set's last full text. Rows that do not name their questions are left out where others
    do. Rows of other suites and tests only need the same reader.
    """
    lines = [row for row in rows if row.get("suite") == "quality" and "test" not in row]
    reader = {row.get("dataset"): row.get("reader") for row in lines if row.get("method") == "full"}
    kept = [row for row in rows if row.get("reader") == reader.get(row.get("dataset"), row.get("reader"))]
    counts: dict[Any, Counter[Any]] = defaultdict(Counter)
    for row in lines:
        if "questions" in row and row.get("reader") == reader.get(row.get("dataset")):
            counts[row.get("dataset")][row["questions"]] += 1
    most = {dataset: found.most_common(1)[0][0] for dataset, found in counts.items()}
    return [
        row
        for row in kept
        if row.get("suite") != "quality" or "test" in row or row.get("questions") == most.get(row.get("dataset"))
    ]


LINE = (
    "suite", "test", "dataset", "half", "method", "ratio_asked", "budget_of", "sending", "level", "calibrated_by", "priced",
    "allocation", "score", "temperature", "position", "reader", "device", "dtype", "reader_shape", "interface",
    "context_asked", "batch",
)  # fmt: skip


def key_of(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    """The values of a row under `names`, None where it has none."""
    return tuple(row.get(name) for name in names)


def newest(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """The newest row for each combination of values under `names`, in order of first appearance."""
    return list({key_of(row, names): row for row in rows}.values())


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each line, in order of first appearance."""
    found = {(*key_of(row, LINE), row.get("passages") if row.get("suite") == "speed" else None): row for row in rows}
    return list(found.values())


def by_dataset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Quality and speed rows by dataset, in order of appearance; rows of tests of speed have none and are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("suite") == "quality" or (row.get("suite") == "speed" and "test" not in row):
            found.setdefault(str(row.get("dataset", "")), []).append(row)
    return found


def clean(row: Row) -> Row:
    """The row without None, NaN and infinite entries, floats rounded to six significant digits."""
    return {key: _rounded(value) for key, value in row.items() if _measured(value)}


def provenance(reader: Reader, seed: int, compressor: Compressor | None = None) -> Row:
    """The origin of a row: `command`, `commit`, `device`, `dtype`, `seed`, `date` and fingerprints."""
    return {
        "command": command(),
        "commit": commit(),
        "device": device_name(str(reader.device)),
        "dtype": str(reader.dtype).removeprefix("torch."),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "reader": reader.fingerprint,
        "compressor": None if compressor is None else compressor.fingerprint,
    }


def command(argv: Sequence[str] | None = None) -> str:
    """The running command as a user would type it: bare program name, relative paths where possible."""
    program, *arguments = sys.argv if argv is None else argv
    name = Path(program).name
    return shlex.join([name.removesuffix(".py"), *(_relative(argument) for argument in arguments)])


@cache
def commit() -> str | None:
    """Short hash of the checked-out commit, with `+` if tracked code differs from it; None outside a checkout."""
    try:
        short = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return short + "+" * bool(changed)


@cache
def device_name(device: str) -> str:
    """Name of the device: the card for CUDA, the number of cores for the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    if device == "cpu":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    return device


def _git(*arguments: str) -> str:
    if not (PACKAGE / ".git").exists():
        raise OSError(f"{PACKAGE} is no git checkout.")
    done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _relative(argument: str) -> str:
    flag, equals, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    if not os.path.isabs(value):
        return argument
    path = Path(value)
    for base in (Path.cwd(), PACKAGE):
        if path.is_relative_to(base):
            return f"{flag}{equals}{path.relative_to(base)}"
    return f"{flag}{equals}{path.name}"


def _measured(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
