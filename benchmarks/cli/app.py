"""`nutgraf bench`: quality, reading, speed and the report, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..costs.roofline import measure
from ..loading import dataset_name, find_reader, find_records
from ..methods import FullText, Method, NoContext, named_methods
from ..quality.quality import Settings
from ..quality.reading import answer_swap, gold_positions
from ..report.report import write_report
from ..report.table import terminal_table
from ..rows import RESULTS, by_dataset, latest, paired, read_rows
from ..speed.speed import speed as measure_speed
from ..speed.timing import Contender
from .allocation import allocation
from .compressing import compress
from .options import (
    Again,
    Batch,
    Compressors,
    Device,
    Dtype,
    File,
    Half,
    Limit,
    Out,
    Ratios,
    ReaderName,
    Seed,
    Tokens,
    friendly_errors,
    keep,
)
from .quality import quality
from .selection import selection
from .speed import Asked, run_account
from .studies import gate
from .training import training

bench_app = typer.Typer(no_args_is_help=True, help="Measure quality, speed and cost on equal terms.")

bench_app.command()(quality)


@bench_app.command()
def reading(
    file: File,
    reader: ReaderName = "reader-small",
    compressor: Compressors = [],  # noqa: B006
    ratio: Ratios = [],  # noqa: B006
    half: Half = None,
    limit: Limit = None,
    position: Annotated[list[int] | None, typer.Option(help="Places of the gold passage, from 0; default all.")] = None,
    swap: Annotated[bool, typer.Option(help="Replace the answer in the passages by another of like kind.")] = True,
    move: Annotated[bool, typer.Option(help="Move the gold passage among its distractors.")] = True,
    max_new_tokens: Tokens = 24,
    batch_size: Batch = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """Does the reader read? The gold passage moved among distractors, and the answer replaced by another."""
    with friendly_errors():
        settings = Settings(dataset_name(file), max_new_tokens, batch_size, seed=seed)
        records = find_records(file, half, limit)
        loaded = find_reader(reader, device, dtype)
        methods: list[Method] = [FullText(), *named_methods(loaded, compressor, ratio)]
        rows = gold_positions(loaded, methods, records, settings, position) if move else []
        rows += answer_swap(loaded, [*methods, NoContext()], records, settings) if swap else []
        rows = [row | ({"half": half} if half else {}) for row in rows]
        keep(rows, out)
        for row in rows:
            where = f"gold at {row['position']}" if row["test"] == "gold-position" else "answer swapped"
            more = f"  old answer {100 * row['em_old']:.1f}" if "em_old" in row else ""
            more += f"  follows {100 * row['follows']:.1f}" if row.get("follows") is not None else ""
            typer.echo(f"{where:16} {row['method']:20} EM {100 * row['em']:5.1f}  F1 {100 * row['f1']:5.1f}{more}")


@bench_app.command()
def speed(
    file: Annotated[
        str | None, typer.Argument(help="Questions with real passages, or none and --context for lengths by numbers.")
    ] = None,
    reader: ReaderName = "reader-small",
    compressor: Compressors = [],  # noqa: B006
    ratio: Ratios = [],  # noqa: B006
    passages: Annotated[
        list[int] | None, typer.Option(help="Numbers of passages; default 1, 2, 4, 6, 8, 10, with --context 10.")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens of all passages together. Repeatable.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="A reader of this shape with random weights: llama-1b, llama-3b, llama-8b, ...")
    ] = None,
    slots: Annotated[
        list[float] | None,
        typer.Option(help="Ratio of slots of random values (--context); default without --compressor 4, 16, 32, 512."),
    ] = None,
    interface: Annotated[list[str] | None, typer.Option(help="Of random slots: embeds (default), kv.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at a time (--context); default 1.")] = None,
    requests: Annotated[int, typer.Option(help="Different requests at each number of passages.")] = 3,
    repeats: Annotated[int, typer.Option(help="Rounds over all requests and methods that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them (--context).")] = 1,
    again: Again = False,
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded to time one.")] = 16,
    half: Half = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report of these rows.")] = None,
) -> None:
    """Time to the first token and decoding: over a file's passages, or at context lengths given by numbers.

    With --context (and --shape for a reader of random weights) every row is a full account: compress, load, build, prefill,
    decode, memory, operations, bytes, the distance to the device's roofline, and the reads after which compressing pays.
    Rows that --out holds are not measured again, so a run can be stopped and gone on with.
    """
    with friendly_errors():
        if context:
            if file is not None:
                raise ValueError(f"Give a file or --context, not both; got {file} and {context}.")
            run_account(
                Asked(
                    reader=reader,
                    shape=shape,
                    compressors=compressor,
                    ratios=ratio,
                    slots=slots or (),
                    interfaces=interface or ["embeds"],
                    contexts=context,
                    passages=passages or [10],
                    batches=batch or [1],
                    repeats=repeats,
                    warmup=warmup,
                    decode_tokens=decode_tokens,
                    seed=seed,
                    device=device,
                    dtype=dtype,
                    out=out,
                    again=again,
                )
            )
            return
        if file is None or shape is not None:
            raise ValueError(
                "Give a file of questions (or `sample`), or lengths by --context, with --reader or --shape."
            )
        records = find_records(file, half)
        loaded = find_reader(reader, device, dtype)
        contenders = [Contender(m.name, m.compressor, m.ratio) for m in named_methods(loaded, compressor, ratio)]
        rows = measure_speed(
            loaded,
            contenders,
            records,
            passages=passages or (1, 2, 4, 6, 8, 10),
            requests=requests,
            repeats=repeats,
            decode_tokens=decode_tokens,
            dataset=dataset_name(file),
            seed=seed,
            roofline=measure(str(loaded.device), str(loaded.dtype).removeprefix("torch.")),
        )
        keep(rows, out)
        for row in rows:
            online = f"  online {row['ttft_online_ms']:8.1f} ms" if "ttft_online_ms" in row else ""
            typer.echo(
                f"{row['passages']:3} passages  {row['context_tokens']:6.0f} tokens  {row['method']:20} "
                f"TTFT {row['ttft_ms']:8.1f} ms{online}  decode {row['decode_ms_per_token']:6.2f} ms/token"
            )
        if report is not None:
            typer.echo(f"Report: {write_report(report, rows)}")


bench_app.command()(gate)
bench_app.command()(selection)
bench_app.command()(training)
bench_app.command()(compress)
bench_app.command()(allocation)


@bench_app.command("report")
def report_command(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results files or folders; default the committed ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("reports/report.html"),
    dataset: Annotated[str | None, typer.Option(help="Only rows of this dataset.")] = None,
) -> None:
    """One HTML file of results rows, and their table."""
    with friendly_errors():
        rows = [row for row in read_rows(files or [RESULTS]) if dataset is None or row.get("dataset") == dataset]
        groups = by_dataset(latest(paired(rows)))
        for name, group in groups.items():
            Console().print(terminal_table(group, name, [row for rows in groups.values() for row in rows]))
        typer.echo(f"Report: {write_report(out, rows)}")
