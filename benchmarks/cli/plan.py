"""`nutgraf plan`: whether compressing pays for a reader, its passages and a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..costs.costs import DecoderShape, item_bytes
from ..costs.plan import Hardware, Line, Load, best, work_out
from ..costs.roofline import Roofline, measure
from ..costs.shapes import find_shape
from .options import wide_console


def plan(
    reader: Annotated[
        str, typer.Option(help="A shape (llama-8b, ...), a shipped reader, a folder, a config or a hub id.")
    ],
    passage_tokens: Annotated[list[int], typer.Option(help="Length of a passage; repeatable, all equally frequent.")],
    passages: Annotated[int, typer.Option(help="Passages a query.")] = 10,
    hits: Annotated[float, typer.Option(help="How often a passage is read in its life.")] = 10.0,
    ratio: Annotated[list[float] | None, typer.Option(help="Compression ratio; repeatable; default 4, 16.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="The device's TFLOP/s in products; default: measured here.")
    ] = None,
    gbps: Annotated[float | None, typer.Option(help="Its memory bandwidth in GB/s; default: measured here.")] = None,
    store_gbps: Annotated[float, typer.Option(help="GB/s at which stored passages are read.")] = 1.0,
    efficiency: Annotated[float, typer.Option(help="Share of the device's rates that is reached.")] = 1.0,
    overhead_ms: Annotated[float, typer.Option(help="What every request takes beside the model.")] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(help="Question and template.")] = 64,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    corpus: Annotated[int, typer.Option(help="Passages in the store.")] = 100_000,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="What is measured: auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Does compressing pay, and with which methods? Estimates from the reader's config; no weights are read."""
    try:
        load = Load(tuple(passage_tokens), passages, hits, prompt_tokens, answer_tokens, corpus)
        item_bytes(dtype)
        if (tflops is None) != (gbps is None):
            raise ValueError("Give both --tflops and --gbps, or neither, then this machine is measured.")
        shape = find_shape(reader)
        roofline = _given(tflops, gbps, dtype) if tflops is not None and gbps is not None else _measured(device, dtype)
        hardware = Hardware(roofline, efficiency, overhead_ms / 1000, store_gbps * 1e9)
        lines = work_out(shape, load, hardware, ratio or (4.0, 16.0))
    except (ValueError, OSError, ImportError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    verdict = sentence(lines, load)
    if as_json:
        typer.echo(json.dumps(_document(shape, load, hardware, lines, verdict), indent=2, allow_nan=False))
        return
    console = wide_console()
    console.print(
        f"{shape.name}: {shape.parameters / 1e9:.3g} B weights, {shape.weight_bytes(dtype) / 1e9:.3g} GB in {dtype}; "
        f"{roofline.flops / 1e12:.4g} TFLOP/s and {roofline.bandwidth / 1e9:.4g} GB/s, {roofline.source}.",
        highlight=False,
    )
    console.print(plan_table(lines, load))
    console.print(verdict, highlight=False, style="bold")
    console.print(
        "Times are floors: the device's rates over what must be computed and moved. `nutgraf bench speed` measures them, and "
        "`nutgraf bench quality` what an answer loses, which is no part of this.",
        highlight=False,
    )


def sentence(lines: Sequence[Line], load: Load) -> str:
    """The verdict."""
    full, found = lines[0], best(lines)
    room = "" if full.fits else " The full text has no room in this reader."
    if found is full:
        return f"At {load.hits:g} reads a passage nothing here pays: read the full text.{room}"
    paying = list(dict.fromkeys(line.family for line in lines[1:] if line.pays and line.fits and line is not found))
    others = [family for family in paying if family != found.family]
    return (
        f"Compressing pays. Most time is saved by {found.family} ({found.methods}) at {found.ratio:.3g}x: TTFT "
        f"{_number(found.ttft_ms)} ms in place of {_number(full.ttft_ms)} ms ({found.ttft_speedup:.3g}x), paid for after "
        f"{reads_in_words(found.break_even_reads or 0.0)} of {load.hits:g}."
        + (f" These pay too: {', '.join(others)}." if others else "")
        + room
    )


def reads_in_words(reads: float) -> str:
    """A number of reads, as `less than one read`."""
    return "less than one read" if reads < 1 else f"{reads:,.1f} reads"


def plan_table(lines: Sequence[Line], load: Load) -> Table:
    """The lines for `rich`."""
    tokens = sum(load.passage_tokens) / len(load.passage_tokens)
    title = f"{load.passages} passages of {tokens:,.0f} tokens a query, each read {load.hits:g} times"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    names = (
        "family",
        "slots",
        "compress\nms",
        "load\nms",
        "TTFT\nms",
        "x full",
        "token\nms",
        "passage\nKB",
        "store\nGB",
    )
    for number, name in enumerate((*names, "paid at\nreads", "pays")):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        full = line is lines[0]
        after = "never" if line.break_even_reads is None else f"{line.break_even_reads:,.1f}"
        table.add_row(
            line.family if full else f"{line.family} {line.ratio:.3g}x",
            f"{line.slots:,.0f}",
            "" if full else _number(line.compress_ms),
            "" if full else _number(line.load_ms),
            _number(line.ttft_ms),
            f"{line.ttft_speedup:.2f}",
            _number(line.decode_ms),
            "" if full else f"{line.bytes_per_passage / 1e3:,.1f}",
            "" if full else f"{line.store_bytes / 1e9:,.2f}",
            "" if full else after,
            ("" if full else "yes" if line.pays else "no") + ("" if line.fits else " (no room)"),
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _given(tflops: float, gbps: float, dtype: str) -> Roofline:
    return Roofline(tflops * 1e12, gbps * 1e9, dtype, "given")


def _measured(device: str, dtype: str) -> Roofline:
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure(device, dtype)


def _document(
    shape: DecoderShape, load: Load, hardware: Hardware, lines: Sequence[Line], verdict: str
) -> dict[str, Any]:
    found = best(lines)
    return {
        "reader": dataclasses.asdict(shape) | {"parameters": shape.parameters},
        "load": dataclasses.asdict(load),
        "hardware": dataclasses.asdict(hardware),
        "lines": [dataclasses.asdict(line) for line in lines],
        "pays": found is not lines[0],
        "best": dataclasses.asdict(found),
        "verdict": verdict,
    }
