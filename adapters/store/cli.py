"""`nutgraf compress` and `nutgraf store`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ...console import friendly_errors
from .base import StoreError

store_app = typer.Typer(no_args_is_help=True, help="Maintain a store of compressed passages.")

Folder = Annotated[str, typer.Argument(help="The store: a folder or a URI for LanceDB.")]
CompressorName = Annotated[
    str,
    typer.Option("--compressor", "-c", help="A method without training, a shipped compressor, a folder or a hub id."),
]
ReaderName = Annotated[str, typer.Option("--reader", "-r", help="A shipped reader, a folder or a hub id.")]
Ratio = Annotated[float | None, typer.Option(help="Compression ratio; default: the compressor's own.")]
Batch = Annotated[int, typer.Option(min=1, help="Passages compressed and stored at a time.")]
Device = Annotated[str, typer.Option(help="Where the models run: auto, cpu, cuda, ...")]
Dtype = Annotated[str | None, typer.Option(help="Store slots as float16, bfloat16 or float32.")]
Quantize = Annotated[str | None, typer.Option(help="Store slots as int8 or int4.")]
Group = Annotated[int | None, typer.Option(help="Dimensions per quantisation scale; default 64.")]


_errors = functools.partial(
    friendly_errors, StoreError, stopped="Stopped; finished batches are stored. Run the same command again to continue."
)


def compress(
    corpus: Annotated[Path, typer.Argument(help="JSON lines or text (.jsonl, .txt, .md; also .xz, .gz), or a folder.")],
    store: Annotated[str, typer.Option("--store", "-s", help="The store; created if missing.")],
    compressor: CompressorName = "kv-match",
    reader: ReaderName = "reader-smollm2",
    field: Annotated[str, typer.Option(help="Field of the text in JSON lines.")] = "text",
    ratio: Ratio = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most reader tokens of each shorter text, instead of a ratio.")
    ] = None,
    batch_size: Batch = 64,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = None,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="local: this process; ray: Ray Data.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Ray actors.")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per Ray actor.")] = 0.0,
    gate: Annotated[
        str | None,
        typer.Option(help="Folder of a fidelity gate: measure each passage and store the result."),
    ] = None,
) -> None:
    """Compress a corpus into a store. Stored passages are skipped: stop it at any time, run it again to continue.

    With NUTGRAF_STORE_KEY set, a new store is encrypted.
    """
    with _errors():
        if engine not in ("local", "ray"):
            raise ValueError(f"engine must be local or ray, got {engine!r}.")
        if gate is not None and engine == "ray":
            raise ValueError("A gate needs --engine local; or leave the gate out and measure at query time.")
        if max_tokens is not None and engine == "ray":
            raise ValueError("--max-tokens needs --engine local; or name it with the compressor: -c NAME:max_tokens=N.")
        from ...compressors import FidelityGate
        from ..checks import with_budget
        from . import LanceStore
        from .corpus import compress_corpus, compress_corpus_with_ray, read_corpus

        total = sum(1 for _ in read_corpus(corpus, field))  # reports a bad line before loading a model
        with LanceStore(store, dtype=dtype, quantize=quantize, group=group) as opened, _progress(total) as done:  # type: ignore[arg-type]
            passages = read_corpus(corpus, field)
            if engine == "ray":
                filled = compress_corpus_with_ray(
                    passages,
                    opened,
                    compressor,
                    reader,
                    ratio=ratio,
                    batch_size=batch_size,
                    workers=workers,
                    gpus=gpus,
                    reader_options={"device": device},
                    done=done,
                )
            else:
                loaded = with_budget(_load(compressor, reader, device), ratio, max_tokens)
                judge = None if gate is None else FidelityGate.from_pretrained(gate, loaded)
                filled = compress_corpus(
                    passages, opened, loaded, ratio=ratio, gate=judge, batch_size=batch_size, done=done
                )
        typer.echo(
            f"{filled.compressed:,} passages compressed ({filled.source_tokens:,} tokens to {filled.slots:,} slots), "
            f"{filled.found:,} were stored already{_updated(filled)}, in {store}."
        )


@store_app.command()
def show(folder: Folder) -> None:
    """Show the contents of a store by compressor, reader and ratio."""
    with _errors(), _open(folder) as store:
        from rich.console import Console
        from rich.table import Table

        stats = store.stats
        table = Table(title=f"{folder}: {stats.passages:,} passages, {_bytes(stats.nbytes)} of slots")
        for name in (
            "compressor",
            "reader",
            "ratio asked",
            "interface",
            "passages",
            "slots",
            "ratio",
            "bytes per passage",
        ):
            table.add_column(name, justify="left" if name in ("compressor", "reader", "interface") else "right")
        for made in stats.makers:
            maker = made.maker
            table.add_row(
                maker.compressor[:12],
                "any" if maker.reader is None else maker.reader[:12],
                "its own" if maker.ratio is None else f"{maker.ratio:g}",
                made.interface,
                f"{made.passages:,}",
                f"{made.slots:,}",
                f"{made.ratio:.2f}",
                f"{made.nbytes / made.passages:,.0f}",
            )
        console = Console()
        console.print(table)
        console.print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in stats.info.items()))


@store_app.command()
def verify(
    folder: Folder,
    drop: Annotated[bool, typer.Option("--drop", help="Delete damaged passages.")] = False,
) -> None:
    """Check every passage against its checksum; exit status 1 if one is damaged."""
    with _errors(), _open(folder) as store:
        from .upkeep import verify as run

        with _progress(store.stats.passages) as done:
            problems = run(store, drop=drop, done=done)
        for problem in problems:
            typer.echo(f"{problem.key}: {problem.what}", err=True)
        typer.echo(f"{len(problems)} damaged passages{' were dropped' if drop and problems else ''}.")
        if problems and not drop:
            raise typer.Exit(1)


@store_app.command()
def compact(
    folder: Folder,
    keep_hours: Annotated[
        float, typer.Option(min=0, help="Keep versions younger than this for active readers.")
    ] = 24.0,
) -> None:
    """Free unreferenced bytes, join small files, update the index. The store stays usable meanwhile."""
    with _errors(), _open(folder) as store:
        from .upkeep import compact as run

        made = run(store, keep_hours)
        what = f"Slabs: {_bytes(made.before)} before, {_bytes(made.after)} after"
        if store.layout == "table":
            what = "The table's small files were joined"
        typer.echo(f"{what}; {made.duplicates} duplicates removed.")


@store_app.command()
def rotate(folder: Folder) -> None:
    """Encrypt a store anew with the first of the keys in NUTGRAF_STORE_KEY; old ones follow it, separated by commas."""
    with _errors(), _open(folder) as store:
        from .upkeep import rotate as run

        with _progress(store.stats.passages) as done:
            number = run(store, done)
        typer.echo(
            f"{number:,} passages encrypted anew; `nutgraf store compact {folder} --keep-hours 0` removes the old bytes."
        )


@store_app.command()
def new_key() -> None:
    """Print a new random key for encrypted stores, to be kept outside of them."""
    from .encryption import new_key as make

    typer.echo(make())


@store_app.command()
def delete(
    folder: Folder,
    about: Annotated[list[str], typer.Option("--about", help="NAME=VALUE stored with the passages: file=a.jsonl.")],
) -> None:
    """Delete the passages of a document, or of other facts stored with them; `compact` then frees their bytes."""
    with _errors(), _open(folder) as store:
        from .upkeep import forget

        if wrong := [pair for pair in about if "=" not in pair]:
            raise ValueError(f"--about takes NAME=VALUE, got {wrong[0]!r}.")
        typer.echo(f"{forget(store, **dict(pair.split('=', 1) for pair in about)):,} passages deleted.")


@store_app.command()
def migrate(
    folder: Folder,
    to: Annotated[str | None, typer.Option(help="Copy to a new store, in the given encoding.")] = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Group = None,
    layout: Annotated[str | None, typer.Option(help="slabs or table; default: by the kind of place.")] = None,
    compressor: Annotated[str | None, typer.Option("--compressor", "-c", help="Recompress the texts with it.")] = None,
    reader: ReaderName = "reader-smollm2",
    ratio: Ratio = None,
    batch_size: Batch = 64,
    device: Device = "auto",
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="Then delete the passages of other compressors.")
    ] = False,
) -> None:
    """Copy a store in another encoding (--to), or recompress its texts for a new compressor or reader (--compressor)."""
    with _errors(), _open(folder) as store:
        if (to is None) == (compressor is None):
            raise ValueError("Give either --to NEW_STORE or --compressor NAME.")
        if to is not None:
            _copy(store, to, dtype=dtype, quantize=quantize, group=group, layout=layout)
        else:
            _recompress(store, _load(str(compressor), reader, device), ratio, batch_size, drop_old)


def _copy(store: Any, to: str, **encoding: Any) -> None:
    from . import LanceStore
    from .upkeep import copy

    with LanceStore(to, **encoding) as target, _progress(store.stats.passages) as done:
        number = copy(store, target, done)
    typer.echo(f"{number:,} passages copied to {to} ({target.encoding}).")


def _recompress(store: Any, compressor: Any, ratio: float | None, batch_size: int, drop_old: bool) -> None:
    from .fill import keys_for
    from .upkeep import drop, recompress

    with _progress(None) as done:
        filled = recompress(store, compressor, ratio=ratio, batch_size=batch_size, done=done)
    typer.echo(f"{filled.compressed:,} passages compressed, {filled.found:,} were stored already.")
    ours = keys_for(compressor, [""], ratio=ratio)[0].maker
    for made in store.stats.makers if drop_old else ():
        if made.maker != ours:
            drop(store, made.maker)
            typer.echo(f"{made.passages:,} passages of the compressor {made.maker.compressor} deleted.")


def _open(folder: str) -> Any:
    from . import LanceStore

    return LanceStore(folder, create=False)


def _load(compressor: str, reader: str, device: str) -> Any:
    from ...compressors import Reader, load_compressor

    return load_compressor(compressor, Reader.from_pretrained(reader, device=device))


def _updated(filled: Any) -> str:
    return f" ({filled.updated:,} of them brought up to date)" if filled.updated else ""


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Progress bar of passages on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("passages", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)
