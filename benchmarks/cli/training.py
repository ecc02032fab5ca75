"""`nutgraf bench training`: options in, rows and a table out."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from ...compressors import Reader
from ..costs.costs import decoder_shape
from ..costs.shapes import random_reader
from ..loading import find_reader
from ..rows import Row, append_rows, clean, command, commit, device_name, provenance, read_rows
from ..speed.training import FAMILIES, Wanted, loss_memory, measure_step
from .options import Again, Device, Dtype, Out, ReaderName, friendly_errors, wide_console

# Settings of the methods as small as their recipes for the shipped reader have them.
SETTINGS: dict[str, dict[str, Any]] = {
    "icae": {"mem_size": 64, "r": 32},
    "gist": {"n_gist": 64, "ratio": 4.0, "r": 32},
    "500x": {"r": 32},
    "pisco": {"r": 32},
    "autocompressor": {"r": 32},
    "mean-pool": {"r": 32},
}
KEY = (
    "test", "objective", "method", "reader_shape", "reader", "device", "dtype", "threads", "batch", "n",
    "target_tokens_asked", "vocabulary",
)  # fmt: skip


def training(
    compressor: Annotated[
        list[str] | None, typer.Option(help="Methods, made with random weights. Repeatable; default icae.")
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help=f"Families of objectives, repeatable: {', '.join(FAMILIES)}; default all.")
    ] = None,
    reader: ReaderName = "reader-small",
    shape: Annotated[str | None, typer.Option(help="A reader of this shape with random weights.")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps; items are drawn 16 batches at a time.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Items of a step.")] = 8,
    memory: Annotated[
        list[int] | None,
        typer.Option(help="Instead: memory of the losses over so many target tokens, at a vocabulary of 128,256."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and items.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    again: Again = False,
    out: Out = None,
) -> None:
    """What a training step costs beside a bare forward and backward pass over the same tokens, and what memory losses take.

    Rows that --out holds are not measured again, so a run can be stopped and gone on with.
    """
    with friendly_errors():
        done = {_key(row) for row in read_rows(out)} if out is not None and out.exists() and not again else set()

        def keep(row: Row) -> None:
            if out is not None:
                append_rows(out, [row])
            wide_console().print(training_table([clean(row)]))

        if memory:
            _memory(memory, objective or ["lm", "kl"], device, seed, done, keep)
            return
        loaded = random_reader(shape, device=device, dtype=dtype, seed=seed) if shape else _find(reader, device, dtype)
        about = {
            "suite": "training",
            "test": "step",
            "reader_shape": decoder_shape(loaded.model.config, shape or loaded.name).name,
            "weights": "random" if shape else None,
            "threads": torch.get_num_threads() if loaded.device.type == "cpu" else None,
            "batch": batch_size,
        }
        for method in compressor or ["icae"]:
            for family in objective or list(FAMILIES):
                head = about | {"method": method, "objective": family, "n": steps} | provenance(loaded, seed)
                if _key(clean(head)) in done:
                    continue
                settings = tuple(SETTINGS.get(method, {}).items())
                found = measure_step(loaded, Wanted(method, family, settings, steps, batch_size=batch_size), seed=seed)
                keep(head | found)


def _memory(
    lengths: list[int], families: list[str], device: str, seed: int, done: set[tuple[Any, ...]], keep: Any
) -> None:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    torch.manual_seed(seed)
    for family in families:
        for tokens in lengths:
            head = {
                "suite": "training",
                "test": "loss-memory",
                "objective": family,
                "vocabulary": 128256,
                "target_tokens_asked": tokens,
                "command": command(),
                "commit": commit(),
                "device": device_name(device),
                "dtype": "float32",
                "seed": seed,
            }
            if _key(head) not in done:
                keep(head | loss_memory(family, tokens, device=device))


def _find(reader: str, device: str, dtype: str) -> Reader:
    return find_reader(reader, device, dtype)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def training_table(rows: list[Row]) -> Table:
    """The rows for `rich`."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    if rows[0]["test"] == "loss-memory":
        for name in ("objective", "target tokens", "vocabulary", "chunk", "extra MB", "bound MB", "unchunked MB"):
            table.add_column(name, justify="right")
        for row in rows:
            sizes = (
                f"{row[key] / 1e6:,.0f}" if key in row else "" for key in ("extra_bytes", "bound_bytes", "whole_bytes")
            )
            table.add_row(
                row["objective"], f"{row['target_tokens']:,}", f"{row['vocabulary']:,}", str(row["chunk"]), *sizes
            )
        return table
    for name in (
        "method",
        "objective",
        "step ms",
        "teacher ms",
        "bare ms",
        "step / bare",
        "tokens/s",
        "bare",
        "peak MB",
    ):
        table.add_column(name, justify="left" if name in ("method", "objective") else "right")
    for row in rows:
        table.add_row(
            row["method"],
            row["objective"],
            f"{row['step_ms']:,.0f}",
            f"{row['teacher_ms']:,.0f}" if "teacher_ms" in row else "",
            f"{row['bare_ms']:,.0f}",
            f"{row['step_cost']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['bare_tokens_per_s']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "",
        )
    return table
