"""What the benchmarks' commands share: their options, compressors by name, errors told in a sentence, tables that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...console import friendly_errors as friendly_errors
from ..loading import hide_loading_bars
from ..rows import append_rows

File = Annotated[str, typer.Argument(help="Questions (.jsonl or .jsonl.xz), or `sample` for the shipped ones.")]
ReaderName = Annotated[str, typer.Option("--reader", help="A shipped reader, a folder or a hub id.")]
Compressors = Annotated[
    list[str],
    typer.Option(
        "--compressor", help="NAME or NAME@RATIO,RATIO; a shipped one, a folder, a hub id, selective-context."
    ),
]
Ratios = Annotated[list[float], typer.Option("--ratio", help="Ratio for compressors that name none. Repeatable.")]
Half = Annotated[str | None, typer.Option(help="Only questions of this half (`tune` or `report`).")]
Limit = Annotated[int | None, typer.Option(help="At most so many questions, evenly spread over each file.")]
Out = Annotated[Path | None, typer.Option(help="Results file that rows are appended to.")]
Again = Annotated[bool, typer.Option("--again", help="Measure rows anew that --out holds.")]
Device = Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on the CPU), float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of baselines, controls and intervals.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Prompts read at a time.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]


hide_loading_bars()


def keep(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Appends rows to a results file, if there is one, and says so."""
    if out is not None:
        append_rows(out, rows)
        typer.echo(f"{len(rows)} rows appended to {out}.")


def wide_console() -> Console:
    """The terminal; where the output goes elsewhere, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
