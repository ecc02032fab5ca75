"""`nutgraf bench selection`: token selection beside the released llmlingua package, case by case."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from ..rows import Row, append_rows, command, read_rows
from ..studies.peer import Peer
from ..studies.selection import CASES, Case, Side, key, measure, row_key
from .options import Again, Out, friendly_errors, wide_console

MEMORY = "memory"


def selection(
    peer_python: Annotated[
        str | None,
        typer.Option(
            help="Interpreter with llmlingua 0.2.2 (benchmarks/README.md); without it only our side is timed."
        ),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name holds this, repeatable; --list shows them.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the names of the cases and stop.")] = False,
    repeats: Annotated[int, typer.Option(help="Pairs that count; 3 at most where one run takes over 5 seconds.")] = 5,
    threads: Annotated[int, typer.Option(help="Of both sides; 0: as many as torch takes.")] = 0,
    tokens: Annotated[int, typer.Option(help="Of the memory case.")] = 16384,
    vocabulary: Annotated[int, typer.Option(help="Of the memory case.")] = 131072,
    work: Annotated[
        Path | None, typer.Option(help="Folder where models are kept; default one that goes again.")
    ] = None,
    again: Again = False,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    out: Out = None,
) -> None:
    """LLMLingua, LongLLMLingua and LLMLingua-2 beside the pip package, one bare forward of the model between them.

    Rows are appended one by one, and what --out holds already is not measured again, so a run can be cut off and gone on with.
    """
    with friendly_errors():
        chosen = choose(case or ())
        if show:
            for name in chosen:
                typer.echo(name)
            return
        threads = threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when a tokenizer first works in parallel
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        have = read_rows(out) if out is not None and out.exists() and not again else []
        known = {key(row) for row in have if row.get("suite") == "selection"}
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(Peer(peer_python, threads)) if peer_python else None
            root = str(work) if work else stack.enter_context(tempfile.TemporaryDirectory())
            side = Side(root, seed)
            rows: list[Row] = []
            for name, found in chosen.items():
                row = _row(side, found, peer, known, repeats, threads, seed, tokens, vocabulary)
                if row is None:
                    typer.echo(f"{name}: there already (--again measures it anew)", err=True)
                    continue
                rows.append(row)
                if out is not None:
                    append_rows(out, [row])
                typer.echo(told(name, row), err=True)
        if rows:
            wide_console().print(selection_table(rows))


def choose(parts: Sequence[str]) -> dict[str, Case | None]:
    """Cases by name whose names hold one of some strings (none: all); the memory case is `None`.

    Raises:
        ValueError: if there is none.
    """
    everything: dict[str, Case | None] = {found.name: found for found in CASES} | {MEMORY: None}
    chosen = {name: found for name, found in everything.items() if not parts or any(part in name for part in parts)}
    if not chosen:
        raise ValueError(f"No case's name holds {' or '.join(map(repr, parts))}; cases are {', '.join(everything)}.")
    return chosen


def _row(
    side: Side,
    case: Case | None,
    peer: Peer | None,
    known: set[tuple[object, ...]],
    repeats: int,
    threads: int,
    seed: int,
    tokens: int,
    vocabulary: int,
) -> Row | None:
    """The row of a case, or None where there is one already."""
    if case is not None:
        if row_key(case, threads, None if peer is None else peer.name) in known:
            return None
        start = time.perf_counter()
        row = measure(side, case, peer, repeats=repeats, threads=threads, seed=seed)
        return row | {"took_s": round(time.perf_counter() - start, 1)}
    if (MEMORY, "llmlingua", "fast", None, tokens, 1, threads, None) in known:
        return None
    # A process of its own: what this one has used before would hide what selection takes.
    arguments = [f"--tokens={tokens}", f"--vocabulary={vocabulary}", f"--threads={threads}"]
    module = "nutgraf.benchmarks.studies.selection_memory"
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"The memory case failed with exit status {done.returncode}; its message stands above.")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found | {"command": command()}


def told(name: str, row: Row) -> str:
    """One line about a row."""
    if row["test"] == MEMORY:
        return f"{name}: {row['extra_bytes'] / 2**20:.1f} MiB over one forward"
    beside = f", package {row['peer_seconds']:.3f} s, {row['speedup']:.2f} times as long" if "speedup" in row else ""
    return f"{name}: {row['seconds']:.3f} s{beside}; {row['over_bare']:.3f} of a bare forward; {row['took_s']:.0f} s in all"


def selection_table(rows: Sequence[Row]) -> Table:
    """The rows for `rich`."""
    table = Table(
        title="Token selection", title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False
    )
    names = (
        "method",
        "mode",
        "model",
        "passages\nx tokens",
        "kept\n%",
        "package\nkept %",
        "s",
        "package\ns",
        "x faster",
    )
    for number, name in enumerate((*names, "x bare\nforward", "positions\n/ package's", "extra\nMiB")):
        table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            row["mode"],
            row.get("model", row["model_shape"]),
            f"{row['passages']} x {row['tokens'] // row['passages']:,}",
            _number(row, "rate", 100, 1),
            _number(row, "peer_rate", 100, 1),
            _number(row, "seconds", 1, 3),
            _number(row, "peer_seconds", 1, 3),
            _number(row, "speedup", 1, 2),
            _number(row, "over_bare", 1, 3),
            _number(row, "forwarded_ratio", 1, 3),
            _number(row, "extra_bytes", 2**-20, 1),
        )
    return table


def _number(row: Row, name: str, scale: float, digits: int) -> str:
    return f"{scale * row[name]:,.{digits}f}" if name in row else ""
