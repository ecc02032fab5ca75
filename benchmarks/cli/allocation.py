"""`nutgraf bench allocation`: a budget of slots by retrieval score against one ratio for all passages."""

from __future__ import annotations

from typing import Annotated

import typer

from ..loading import dataset_name, find_reader, find_records
from ..methods import named_methods
from ..quality.quality import Settings
from ..rows import Row, append_rows
from ..studies.allocation import SCORERS, allocation_rows
from .options import Batch, Device, Dtype, File, Half, Limit, Out, Ratios, ReaderName, Tokens, friendly_errors


def allocation(
    file: File,
    reader: ReaderName = "reader-small",
    compressor: Annotated[
        list[str], typer.Option("--compressor", help="NAME or NAME@RATIO,RATIO; one whose ratio can be chosen.")
    ] = [],  # noqa: B006 (typer copies it)
    ratio: Ratios = [],  # noqa: B006
    half: Half = None,
    limit: Limit = None,
    passages: Annotated[
        int, typer.Option(help="So many passages a question: distractors are cut, or topped up from other questions.")
    ] = 4,
    score: Annotated[
        list[str] | None,
        typer.Option(help=f"Retrieval score, repeatable: {', '.join(SCORERS)}, gold; default embedder."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="The lower, the more the best passages get. Repeatable; default 1.")
    ] = None,
    lowest: Annotated[float, typer.Option(help="Compression ratio that no passage falls below.")] = 1.0,
    max_new_tokens: Tokens = 24,
    batch_size: Batch = 16,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """A budget of slots over several passages: one ratio for all of them, or slots by retrieval score."""
    with friendly_errors():
        settings = Settings(f"{dataset_name(file)}, {passages} passages", max_new_tokens, batch_size, seed=seed)
        records = find_records(file, half, limit, passages=passages)
        loaded = find_reader(reader, device, dtype)
        methods = named_methods(loaded, compressor, ratio)
        if not methods:
            raise ValueError("Name a compressor whose slots are to be divided, such as --compressor mean-pool-small@8.")

        def keep(row: Row) -> None:
            row |= {"half": half} if half else {}
            if out is not None:
                append_rows(out, [row])

        rows = allocation_rows(
            loaded,
            methods,
            records,
            settings,
            scorers=score or ["embedder"],
            temperatures=temperature or [1.0],
            lowest=lowest,
            on_row=keep,
        )
        for row in rows:
            typer.echo(allocation_line(row))


def allocation_line(row: Row) -> str:
    """A row in one line of text."""
    name = row["method"] + (f" {row['ratio_asked']:g}x" if row.get("ratio_asked") else "")
    how = row.get("allocation", "")
    if how == "score":
        how = f"by {row['score']}, T={row['temperature']:g}"
    line = f"{name:20} {how:22} {row['reader_tokens']:7.1f} tokens  F1 {100 * row['f1']:5.1f}"
    if "f1_minus_uniform" in row:
        low, high = 100 * row["f1_minus_uniform_low"], 100 * row["f1_minus_uniform_high"]
        line += f"  {100 * row['f1_minus_uniform']:+.1f} ({low:+.1f} to {high:+.1f})"
    if "nll_minus_uniform" in row:
        low, high = row["nll_minus_uniform_low"], row["nll_minus_uniform_high"]
        line += f"  answer {row['nll_minus_uniform']:+.2f} nats ({low:+.2f} to {high:+.2f})"
    return line
