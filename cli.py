"""The command line: `nutgraf train`, `sweep`, `inspect`, `bench`, `plan`, `demo`.

Heavy modules are imported by the commands that use them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import _escape, friendly_errors, highlight
from .shipped import locate

if TYPE_CHECKING:
    from .compressors import CompressedPassage, Compressor

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Compress the passages a RAG reader reads: train compressors, look at what they make, measure them.",
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (xrag, icae, llmlingua2, reader, ...) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, as in data.dir=corpus stages.0.steps=200 'stages.*.lr=1e-3'.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = ...,  # type: ignore[assignment]
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the folder, or start over.")] = True,
    max_minutes: Annotated[float | None, typer.Option(help="Stop with a checkpoint after so many minutes.")] = None,
) -> None:
    """Train a reader or a compressor by a recipe; stop it at any time and run it again to go on."""
    with friendly_errors():
        from .recipes.tasks.registry import make_task
        from .recipes.training.schema import load_recipe
        from .recipes.training.trainer import run_recipe

        loaded = load_recipe(recipe, overrides or [])
        result = run_recipe(loaded, make_task(loaded), out, resume=resume, max_minutes=max_minutes)
        typer.echo(str(result))


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A shipped compressor recipe or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings; those with several values are the grid, as in seed=0,1 'stages.*.lr=1e-3,2e-3'."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs, one folder a cell.")] = ...,  # type: ignore[assignment]
    questions: Annotated[
        list[str], typer.Option("--eval", help="Question file, by its path or its name in data.dir; may be repeated.")
    ] = ...,  # type: ignore[assignment]
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Compression ratio to evaluate at; may be repeated. Default: the recipe's."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each file.")] = 200,
    half: Annotated[str, typer.Option(help="Half of the questions: tune, report or all.")] = "tune",
    results: Annotated[
        Path | None, typer.Option(help="File the rows are appended to; default: sweeps.jsonl in the folder.")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")] = None,
) -> None:
    """Train a recipe once for every combination of settings and score each; run it again to go on where it stopped."""
    with friendly_errors():
        from .benchmarks.rows import append_rows, provenance, read_rows
        from .recipes.sweep import Evaluation, best_first, make_cells, parse_grid, run_sweep

        cells = make_cells(recipe, *parse_grid(settings or []))
        asked = Evaluation(tuple(questions), None if half == "all" else half, limit, tuple(ratio or [None]))
        file = results or out / "sweeps.jsonl"
        rows = run_sweep(
            cells,
            out,
            asked,
            lambda made: append_rows(file, made),
            have=read_rows(file) if file.exists() else [],
            about=provenance,
            max_minutes=max_minutes,
            say=typer.echo,
        )
        _show_sweep(best_first(rows))
        typer.echo(str(file))


@app.command()
def inspect(
    text: Annotated[str, typer.Argument(help="The passage, a file that holds it, or - for standard input.")],
    compressor: Annotated[
        str, typer.Option("--compressor", "-c", help="A shipped compressor, a folder, a hub id or a method's name.")
    ],
    reader: Annotated[str, typer.Option(help="A shipped reader, a folder or a hub id.")] = "reader-small",
    ratio: Annotated[float | None, typer.Option(help="Compression ratio; default: the compressor's own.")] = None,
    query: Annotated[str | None, typer.Option(help="Compress for this question, and answer it.")] = None,
) -> None:
    """Show what a compressor makes of a text: tokens, slots, and what the reader can still tell of it."""
    with friendly_errors():
        from .compressors import COMPRESSORS, Reader, load_compressor, make_compressor

        passage_text = _read_text(text)
        loaded = Reader.from_pretrained(locate(reader))
        method = COMPRESSORS.get(compressor)
        made = make_compressor(compressor, loaded) if method else load_compressor(locate(compressor), loaded)
        (found,) = made.compress([passage_text], query=query, ratio=ratio)
        _show(made, found, passage_text, query)


@app.command(name="import")
def import_(
    name: Annotated[str, typer.Argument(help="Whose layout: xrag, icae, pisco, cocom, autocompressor, gist, ...")],
    path: Annotated[str, typer.Argument(help="The checkpoint's file or folder, or a hub id.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="What the checkpoint does not say, as in mean_compression_rate=4.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    reader: Annotated[str | None, typer.Option(help="The reader it was trained for: a folder or a hub id.")] = None,
    device: Annotated[str, typer.Option(help="Where the models go that are built: cpu, cuda, auto.")] = "cpu",
) -> None:
    """Make a compressor out of a checkpoint that was published in its authors' own layout."""
    with friendly_errors():
        from .compressors.importers import describe_ignored, import_to
        from .recipes.training.yaml_values import parse_value

        given = {}
        for setting in settings or []:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"Settings are written name=value, got {setting!r}.")
            given[key] = parse_value(value)
        found = locate(reader) if reader else None
        ignored = import_to(name, path, out, found, device=device, **given)
        for line in describe_ignored(ignored):
            typer.echo(f"left out, {line}", err=True)
        typer.echo(str(out))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def compress(context: typer.Context) -> None:
    """Compress a corpus into a store, once, when it is indexed."""
    from .adapters.store.cli import compress as run

    single = typer.Typer(add_completion=False)
    single.command(help=run.__doc__)(run)
    single(args=context.args or ["--help"], prog_name="nutgraf compress")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def store(context: typer.Context) -> None:
    """Show, verify, compact or migrate a store of compressed passages."""
    from .adapters.store.cli import store_app

    store_app(args=context.args or ["--help"], prog_name="nutgraf store")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a reader to OpenAI clients, prompt embeddings included."""
    from .adapters.serve.cli import serve as run

    single = typer.Typer(add_completion=False)
    single.command(help=run.__doc__)(run)
    single(args=context.args or ["--help"], prog_name="nutgraf serve")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure quality, reading, speed and cost on equal terms."""
    from .benchmarks.cli.app import bench_app

    bench_app(args=context.args or ["--help"], prog_name="nutgraf bench")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Does compressing pay, for a reader, its passages and a device? Estimates; no weights are read."""
    from .benchmarks.cli.plan import plan as run

    single = typer.Typer(add_completion=False)
    single.command(help=run.__doc__)(run)
    single(args=context.args or ["--help"], prog_name="nutgraf plan")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Retrieve, compress, answer, train and measure, with what ships in the package."""
    from .benchmarks.cli.demo import demo as run

    single = typer.Typer(add_completion=False)
    single.command(help=run.__doc__)(run)
    single(args=context.args, prog_name="nutgraf demo")


def _show_sweep(rows: list[dict[str, Any]]) -> None:
    """Print the cells of a sweep, the best first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("settings", "dataset", "ratio", "F1", "F1 full", "recovered", box=None)
    for row in rows:
        said = " ".join(f"{key}={value}" for key, value in row["settings"].items())
        if "diverged" in row:
            table.add_row(said, "", "", "diverged", "", "")
            continue
        recovered = row.get("recovered_share")
        table.add_row(
            said,
            row["dataset"],
            f"{row['ratio']:.1f}",
            f"{row['f1']:.3f} ± {row['f1_se']:.3f}",
            f"{row['f1_full']:.3f}",
            "" if recovered is None else f"{recovered:.2f}",
        )
    Console().print(table)


def _show(compressor: Compressor, found: CompressedPassage, text: str, query: str | None) -> None:
    """Print one compressed passage."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("method", str(found.info.get("method", compressor.config_class.method)))
    table.add_row("interface", found.interface)
    table.add_row("source tokens", f"{found.source_tokens:,}")
    table.add_row("slots", f"{found.slots:,}")
    table.add_row("compression ratio", f"{found.ratio:.2f}")
    table.add_row("bytes", f"{found.nbytes:,}")
    console.print(table)
    reader = compressor.reader
    if found.interface == "text":
        console.print("\nKept, in bold:")
        console.print(highlight(text, found))
    elif found.embeds is not None and found.slots:
        norms = found.embeds.float().norm(dim=-1).tolist()
        console.print(f"\nSlot norms (the reader's own embeddings: {reader.embedding_norm:.2f} in the mean):")
        console.print(" ".join(f"{norm:.2f}" for norm in norms), highlight=False)
        from .recipes.data.templates import autoencoding_prompt

        room = min(found.source_tokens + 8, 512)
        told = reader.generate([autoencoding_prompt(found)], max_new_tokens=room)[0]
        console.print("\nWhat the reader repeats from the slots:")
        console.print(_escape(told.strip()) or "(nothing)", highlight=False)
    if query is not None:
        from .recipes.data.templates import question_prompt

        answers = reader.generate([question_prompt([found], query), question_prompt([text], query)], max_new_tokens=32)
        console.print(f"\nFrom the compressed passage: {_escape(answers[0].strip())}", highlight=False)
        console.print(f"From the text:               {_escape(answers[1].strip())}", highlight=False)


def _read_text(text: str) -> str:
    """The text itself, the contents of the file it names, or standard input for `-`."""
    if text == "-":
        return typer.get_text_stream("stdin").read()
    path = Path(text)
    with contextlib.suppress(OSError):  # a passage can be longer than a file's name may be
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return text


if __name__ == "__main__":
    app()
