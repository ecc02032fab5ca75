"""`nutgraf bench quality`: answers from compressed passages, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..baselines import BASELINES
from ..loading import dataset_name, find_reader, find_records, store_encoding
from ..methods import EqualBudget, lines, named_methods
from ..quality.quality import Line, Settings, evaluate
from ..quality.remaining import holds, remaining
from ..report.report import write_report
from ..report.table import terminal_table
from ..rows import Row, append_rows, read_rows
from .options import Batch, Device, Dtype, File, Half, Limit, Out, Ratios, ReaderName, Tokens, friendly_errors


def quality(
    file: File,
    reader: ReaderName = "reader-small",
    compressor: Annotated[
        list[str],
        typer.Option(
            "--compressor", help="NAME or NAME@RATIO,RATIO; a shipped one, a folder, a hub id, selective-context."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    ratio: Ratios = [],  # noqa: B006
    half: Half = None,
    limit: Limit = None,
    passages: Annotated[
        int | None,
        typer.Option(help="So many passages a question: distractors are cut, or topped up from other questions."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"Equal-budget baselines, repeatable: {', '.join(BASELINES)}, none; default all."),
    ] = None,
    baselines_of: Annotated[
        str | None,
        typer.Option(help="Baselines under the budgets of this method alone (`mean-pool`); default of every one."),
    ] = None,
    shuffled: Annotated[bool, typer.Option(help="Also read another question's compressed passages.")] = True,
    store_precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Also read the slots as a store gives them back that keeps them so, repeatable: int8, int4, float16, "
            "bfloat16."
        ),
    ] = None,
    ttft: Annotated[
        int, typer.Option(help="Also time so many questions to the first token, slots in memory; 0: none.")
    ] = 0,
    max_new_tokens: Tokens = 24,
    batch_size: Batch = 16,
    beta: Annotated[float, typer.Option(help="Weight of recall in ROUGE-L.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of baselines, controls and intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Leave out lines that --out holds, measured by the same code and weights on the same questions."
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report of these rows.")] = None,
) -> None:
    """Answers from compressed passages between the full text and no context, beside text of the same length."""
    with friendly_errors():
        if resume and out is None:
            raise ValueError("--resume goes on with what --out holds; give --out.")
        names = [name for name in (BASELINES if baseline is None else baseline) if name != "none"]
        dataset = dataset_name(file) + (f", {passages} passages" if passages else "")
        settings = Settings(dataset, max_new_tokens, batch_size, beta, seed, ttft=ttft)
        encodings = [store_encoding(precision) for precision in store_precision or ()]
        records = find_records(file, half, limit, passages=passages)
        loaded = find_reader(reader, device, dtype)
        made = named_methods(loaded, compressor, ratio)
        if encodings and all(method.compressor.interface == "text" for method in made):
            raise ValueError("--store-precision needs a --compressor that makes slots; text is stored as it is.")
        methods = lines(made, baselines=names, shuffled=shuffled, seed=seed, encodings=encodings)
        if baselines_of is not None:
            if baselines_of not in {method.name for method in made}:
                raise ValueError(
                    f"--baselines-of {baselines_of}: no --compressor is of this method; there are "
                    f"{', '.join(sorted({method.name for method in made})) or 'none'}."
                )
            methods = [m for m in methods if not isinstance(m, EqualBudget) or m.of.name == baselines_of]
        before = [row for row in read_rows(out) if row.get("half") == half] if resume and out and out.exists() else []
        todo = remaining(methods, before, loaded, records, settings) if resume else methods
        if not todo:
            typer.echo(f"{out} holds all {len(methods)} lines of {dataset}.")
            return
        there = {method.name for method in todo[:2] if holds(before, method, loaded, settings)}
        rows: list[Row] = []

        def keep(line: Line) -> None:
            rows.append(line.row | ({"half": half} if half else {}))
            if out is not None and line.method not in there:
                append_rows(out, rows[-1:])

        evaluate(loaded, todo, records, settings, keep)
        if out is not None:
            typer.echo(f"{len(rows) - len(there)} rows appended to {out}.")
        Console().print(terminal_table(rows, f"{settings.dataset}, {rows[0]['n']} questions"))
        if report is not None:
            typer.echo(f"Report: {write_report(report, rows)}")
