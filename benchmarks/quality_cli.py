"""`nutgraf bench quality`: answers from compressed passages, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .baselines import BASELINES
from .loading import dataset_name, find_reader, find_records, store_encoding
from .methods import EqualBudget, lines
from .quality import Line, Settings, evaluate
from .remaining import holds, remaining
from .report import write_report
from .rows import Row, append_rows, read_rows
from .table import terminal_table


def quality(
    file: Annotated[str, typer.Argument(help="Questions (.jsonl or .jsonl.xz), or `sample` for the shipped ones.")],
    reader: Annotated[str, typer.Option("--reader", help="A shipped reader, a folder or a hub id.")] = "reader-small",
    compressor: Annotated[
        list[str],
        typer.Option(
            "--compressor", help="NAME or NAME@RATIO,RATIO; a shipped one, a folder, a hub id, selective-context."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    ratio: Annotated[
        list[float], typer.Option("--ratio", help="Ratio for compressors that name none. Repeatable.")
    ] = [],  # noqa: B006
    half: Annotated[str | None, typer.Option(help="Only questions of this half (`tune` or `report`).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions, evenly spread over the file.")] = None,
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
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 24,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts read at a time.")] = 16,
    beta: Annotated[float, typer.Option(help="Weight of recall in ROUGE-L.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of baselines, controls and intervals.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU), float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Results file that rows are appended to, line by line.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Leave out lines that --out holds, measured by the same code and weights on the same questions."
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report of these rows.")] = None,
) -> None:
    """Answers from compressed passages between the full text and no context, beside text of the same length."""
    from .cli import _methods, friendly_errors  # which imports this module

    with friendly_errors():
        if resume and out is None:
            raise ValueError("--resume goes on with what --out holds; give --out.")
        names = [name for name in (BASELINES if baseline is None else baseline) if name != "none"]
        dataset = dataset_name(file) + (f", {passages} passages" if passages else "")
        settings = Settings(dataset, max_new_tokens, batch_size, beta, seed, ttft=ttft)
        encodings = [store_encoding(precision) for precision in store_precision or ()]
        records = find_records(file, half, limit, passages=passages)
        loaded = find_reader(reader, device, dtype)
        made = _methods(loaded, compressor, ratio)
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
