"""The command line. Heavy modules are imported by the commands that use them."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from .console import friendly_errors, highlight, highlight_kept

if TYPE_CHECKING:
    from .compressors import CompressedPassage, Compressor

# A word with an ending or a rooted path, or a few words with the ending of a text file.
_FILE_NAME = re.compile(
    r"\S+\.[A-Za-z]\w{1,7}|(\.{0,2}|~)/\S+|\S+( \S+){0,3}\.(txt|md|json|jsonl|ndjson|csv|pdf|html?|docx?|xz|gz)", re.I
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Compress retrieved passages for the LLM that reads them: train, inspect, store, serve and measure.",
)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (xrag, icae, llmlingua2, reader, ...) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings, as in data.dir=corpus stages.0.steps=200 'stages.*.lr=1e-3'.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = ...,  # type: ignore[assignment]
    resume: Annotated[
        bool, typer.Option(help="Continue from the newest checkpoint in the folder, or start over.")
    ] = True,
    max_minutes: Annotated[float | None, typer.Option(help="Stop with a checkpoint after this many minutes.")] = None,
) -> None:
    """Train a reader or a compressor by a recipe. Stop it at any time; run it again to continue."""
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
        typer.Argument(help="Settings; several values span the grid, as in seed=0,1 'stages.*.lr=1e-3,2e-3'."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs, one subfolder per cell.")] = ...,  # type: ignore[assignment]
    questions: Annotated[
        list[str], typer.Option("--eval", help="Question file, by path or name in data.dir. Repeatable.")
    ] = ...,  # type: ignore[assignment]
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Compression ratio to evaluate at. Repeatable. Default: the recipe's."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions per file.")] = 200,
    half: Annotated[str, typer.Option(help="Half of the questions: tune, report or all.")] = "tune",
    results: Annotated[
        Path | None, typer.Option(help="Results file to append rows to; default: sweeps.jsonl in the folder.")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop cleanly after this many minutes.")] = None,
) -> None:
    """Train and score a recipe for every combination of settings. Run it again to continue where it stopped."""
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
    text: Annotated[str, typer.Argument(help="The passage, a file with it, or - for standard input.")],
    compressor: Annotated[
        str,
        typer.Option(
            "--compressor", "-c", help="A method without training, a shipped compressor, a folder or a hub id."
        ),
    ] = "kv-match",
    reader: Annotated[str, typer.Option(help="A shipped reader, a folder or a hub id.")] = "reader-smollm2",
    ratio: Annotated[float | None, typer.Option(help="Compression ratio; default: the compressor's own.")] = None,
    query: Annotated[str | None, typer.Option(help="Compress for this question, and answer it.")] = None,
) -> None:
    """Show the compressed form of a text: tokens, slots, and what the reader can repeat from it."""
    with friendly_errors():
        from .compressors import Reader, load_compressor

        passage_text = _read_text(text)
        made = load_compressor(compressor, Reader.from_pretrained(reader))
        (found,) = made.compress([passage_text], query=query, ratio=ratio)
        _show(made, found, passage_text, query)


class _ImportCommand(typer.core.TyperCommand):
    """`nutgraf import`, whose help ends with the settings of every importer."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from .compressors.importers import IMPORTERS, options

        lines = ["Layouts, with their settings and defaults (none: read from the checkpoint, or asked for):"]
        for name in IMPORTERS:
            given = [key if default is None else f"{key}={default}" for key, default in options(name).items()]
            lines.append(f"{name}: {', '.join(given) or 'no settings'}")
        self.epilog = "\n\n".join(lines)
        super().format_help(ctx, formatter)


@app.command(name="import", cls=_ImportCommand)
def import_(
    name: Annotated[str, typer.Argument(help="The published layout; all are listed below, with their settings.")],
    path: Annotated[str, typer.Argument(help="The checkpoint's file or folder, or a hub id.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings missing from the checkpoint, as in mean_compression_rate=4.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    reader: Annotated[str | None, typer.Option(help="The reader it was trained for: a folder or a hub id.")] = None,
    device: Annotated[str, typer.Option(help="Device for the models that are built: cpu, cuda, auto.")] = "cpu",
) -> None:
    """Convert a checkpoint in its authors' published layout into a compressor."""
    with friendly_errors():
        from .compressors.importers import describe_ignored, import_to
        from .recipes.training.yaml_values import parse_value

        given = {}
        for setting in settings or []:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"Settings are written name=value, got {setting!r}.")
            given[key] = parse_value(value)
        ignored = import_to(name, path, out, reader, device=device, **given)
        for line in describe_ignored(ignored):
            typer.echo(f"left out, {line}", err=True)
        typer.echo(str(out))


def _forward(name: str, module: str, target: str, help: str, no_args: tuple[str, ...] = ("--help",)) -> None:
    """Register a command of another module, which is imported when the command runs."""

    def run(context: typer.Context) -> None:
        command = getattr(importlib.import_module(module, __package__), target)
        if not isinstance(command, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(help=command.__doc__)(command)
            command = single
        command(args=context.args or list(no_args), prog_name=f"nutgraf {name}")

    everything = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=help, context_settings=everything, add_help_option=False)(run)


_forward("compress", ".adapters.store.cli", "compress", "Compress a corpus into a store at indexing time.")
_forward("store", ".adapters.store.cli", "store_app", "Show, verify, compact or migrate a store, or delete from it.")
_forward("serve", ".adapters.serve.cli", "serve", "Serve a reader to OpenAI clients, including prompt embeddings.")
_forward(
    "play",
    ".benchmarks.cli.play",
    "play",
    "Open a page on this machine that compares answers from full text and compressed passages.",
    no_args=(),
)
_forward(
    "doctor",
    ".benchmarks.cli.doctor",
    "doctor",
    "Examine the installation, the machine and a reader.",
    no_args=(),
)
_forward("bench", ".benchmarks.cli.app", "bench_app", "Measure quality, reading, speed and cost on equal terms.")
_forward(
    "audit",
    ".benchmarks.cli.audit",
    "audit_command",
    "Measure what someone who copies stored slots, keys and values, or retrieval vectors can read.",
)
_forward(
    "plan", ".benchmarks.cli.plan", "plan", "Estimate whether compression pays for a reader, passages and a device."
)
_forward(
    "demo",
    ".benchmarks.cli.demo",
    "demo",
    "Ask ten questions of real passages on the pretrained reader: full text, kv-match, a shorter text, nothing.",
    no_args=(),
)


def _show_sweep(rows: list[dict[str, Any]]) -> None:
    """Print the cells of a sweep, best first."""
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
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("method", str(found.info.get("method", compressor.config_class.method)))
    table.add_row("interface", found.interface)
    table.add_row("source tokens", f"{found.source_tokens:,}")
    unit = "" if found.counts is None else " pair per head" if found.slots == 1 else " pairs per head"
    table.add_row("slots", f"{found.slots:,}{unit}")
    table.add_row("compression ratio", f"{found.ratio:.2f}")
    table.add_row("bytes", f"{found.nbytes:,}")
    console.print(table)
    reader = compressor.reader
    if found.interface == "text":
        console.print("\nKept, in bold:")
        console.print(highlight(text, found))
    elif found.heads_per_token is not None and found.slots:
        console.print("\nTokens whose keys and values most heads keep, in bold:")
        console.print(highlight_kept(text, found, reader.tokenize_with_offsets(text)[1]))
    elif found.embeds is not None and found.slots:
        norms = found.embeds.float().norm(dim=-1).tolist()
        console.print(f"\nSlot norms (mean of the reader's embeddings: {reader.embedding_norm:.2f}):")
        console.print(" ".join(f"{norm:.2f}" for norm in norms), highlight=False)
        from .recipes.data.templates import autoencoding_prompt

        room = min(found.source_tokens + 8, 512)
        told = reader.generate([autoencoding_prompt(found)], max_new_tokens=room)[0]
        console.print("\nWhat the reader repeats from the slots:")
        console.print(escape(told.strip()) or "(nothing)", highlight=False)
    if query is not None:
        from .recipes.data.templates import question_prompt

        answers = reader.generate([question_prompt([found], query), question_prompt([text], query)], max_new_tokens=32)
        console.print(f"\nFrom the compressed passage: {escape(answers[0].strip())}", highlight=False)
        console.print(f"From the text:               {escape(answers[1].strip())}", highlight=False)


def _read_text(text: str) -> str:
    """Return the text itself, the contents of the file it names, or standard input for `-`."""
    from .compressors.core.textfiles import read_text

    if text == "-":
        return typer.get_binary_stream("stdin").read().decode("utf-8-sig")
    named = False
    with contextlib.suppress(OSError, ValueError):  # a passage can be longer than a file name, or hold what no name can
        named = Path(text).exists()
    if named:
        return read_text(text)
    if _FILE_NAME.fullmatch(text):
        raise FileNotFoundError(
            f"There is no file {text}. To compress these words themselves, send them to standard input: nutgraf inspect -"
        )
    return text


if __name__ == "__main__":
    app()
