"""`nutgraf plan`: whether compressing pays for a reader, its passages and a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import typer
from typer import Option

from ..costs.costs import item_bytes
from ..costs.plan import SELECTED, Hardware, Line, Load, best, loadings, work_out
from ..costs.roofline import Roofline, measure
from ..costs.shapes import find_shape
from ..costs.storage import RAGGED, loading_sentence
from ..loading import pick_device
from ..report.table import row_table
from .expand import takes, wide_console

COLUMNS = (
    "family ratio slots compress_ms ttft_ms ttft_speedup decode_ms bytes_per_passage store_bytes break_even_reads pays"
)
STORED = "form ratio precision bytes_per_passage load_ms prefill_ms text_ms saved_ms least_gbps"


@dataclass(kw_only=True)
class PlanOptions:
    reader: Annotated[
        str, Option(help="A shape (llama-8b, ...), a shipped reader, a folder, a config.json or a hub id.")
    ]
    passage_tokens: Annotated[list[int], Option(help="Length of a passage; repeatable, all equally frequent.")]
    passages: Annotated[int, Option(help="Passages per query.")] = 10
    hits: Annotated[float, Option(help="How often a passage is read in its life.")] = 10.0
    ratio: Annotated[list[float], Option(help="Compression ratio.")] = field(default_factory=lambda: [4.0, 16.0])
    tflops: Annotated[float | None, Option(help="The device's TFLOP/s in products; default: measured here.")] = None
    gbps: Annotated[float | None, Option(help="Its memory bandwidth in GB/s; default: measured here.")] = None
    store_gbps: Annotated[float, Option(help="GB/s at which stored passages are read.")] = 1.0
    efficiency: Annotated[float, Option(help="Share of the device's rates that is reached.")] = 1.0
    overhead_ms: Annotated[float, Option(help="Fixed time of every request.")] = 0.0
    prompt_tokens: Annotated[int, Option(help="Tokens of question and template.")] = 64
    answer_tokens: Annotated[int, Option(help="Tokens of an answer.")] = 32
    corpus: Annotated[int, Option(help="Passages in the store.")] = 100_000
    dtype: Annotated[str, Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    device: Annotated[str, Option(help="The device to measure: auto, cpu, cuda.")] = "auto"
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False


@takes(PlanOptions)
def plan(asked: PlanOptions) -> None:
    """Does compressing pay, and with which methods? Estimates from the reader's config; no weights are read."""
    load = Load(
        tuple(asked.passage_tokens), asked.passages, asked.hits, asked.prompt_tokens, asked.answer_tokens, asked.corpus
    )
    item_bytes(asked.dtype)
    if (asked.tflops is None) != (asked.gbps is None):
        raise ValueError("Give both --tflops and --gbps, or neither, then this machine is measured.")
    shape = find_shape(asked.reader)
    if asked.tflops is not None and asked.gbps is not None:
        roofline = Roofline(asked.tflops * 1e12, asked.gbps * 1e9, asked.dtype, "given")
    else:
        roofline = measure(pick_device(asked.device), asked.dtype)
    hardware = Hardware(roofline, asked.efficiency, asked.overhead_ms / 1000, asked.store_gbps * 1e9)
    lines = work_out(shape, load, hardware, asked.ratio)
    found, verdict = best(lines), sentence(lines, load)
    stored = loadings(shape, load, hardware, asked.ratio, lines[0])
    told = [
        loading_sentence(row, asked.store_gbps) for row in stored if (row.form, row.precision) == (RAGGED, "as made")
    ]
    if asked.as_json:
        document = {
            "reader": dataclasses.asdict(shape) | {"parameters": shape.parameters},
            "load": dataclasses.asdict(load),
            "hardware": dataclasses.asdict(hardware),
            "lines": [dataclasses.asdict(line) for line in lines],
            "pays": found is not lines[0],
            "best": dataclasses.asdict(found),
            "verdict": verdict,
            "stored": [dataclasses.asdict(row) for row in stored],
            "loading": told,
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    console = wide_console()
    console.print(
        f"{shape.name}: {shape.parameters / 1e9:.3g} B weights, {shape.weight_bytes(asked.dtype) / 1e9:.3g} GB in "
        f"{asked.dtype}; {roofline.flops / 1e12:.4g} TFLOP/s and {roofline.bandwidth / 1e9:.4g} GB/s, {roofline.source}.",
        highlight=False,
    )
    tokens = sum(load.passage_tokens) / len(load.passage_tokens)
    title = f"{load.passages} passages of {tokens:,.0f} tokens per query, each read {load.hits:g} times"
    rows = [dataclasses.asdict(line) | {"pays": _pays(line, lines[0])} for line in lines]
    console.print(row_table(rows, COLUMNS, title))
    console.print(verdict, highlight=False, style="bold")
    title = f"Passages from a store at {asked.store_gbps:g} GB/s, against prefilling their text"
    console.print(row_table([dataclasses.asdict(row) for row in stored], STORED, title))
    for line in told:
        console.print(line, highlight=False, style="bold")
    console.print(
        "Times are lower bounds: the work over the device's rates. `nutgraf bench speed` measures them; `nutgraf bench "
        "quality` measures what answers lose, which is not part of this.",
        highlight=False,
    )


def _pays(line: Line, full: Line) -> str:
    return ("" if line is full else "yes" if line.pays else "no") + ("" if line.fits else " (no room)")


def sentence(lines: Sequence[Line], load: Load) -> str:
    """The verdict in a sentence."""
    full, found = lines[0], best(lines)
    room = "" if full.fits else " The full text does not fit into this reader."
    if found is full:
        return f"At {load.hits:g} reads per passage nothing here pays: read the full text.{room}"
    paying = [line for line in lines[1:] if line.pays and line.fits]
    kept = next((line for line in paying if line.family == SELECTED), None)  # the least compressed stands first
    told = [f"Compressing pays. Most time is saved by {_gain(found, full, load)}."]
    if kept is not None and kept is not found:
        told.append(f"Time is not answers: most of them are kept by {_gain(kept, full, load)}.")
    others = dict.fromkeys(line.family for line in paying if line.family not in {found.family, kept and kept.family})
    return " ".join(told) + (f" These pay too: {', '.join(others)}." if others else "") + room


def _gain(line: Line, full: Line, load: Load) -> str:
    reads = line.break_even_reads or 0.0
    return (
        f"{line.family} ({line.methods}) at {line.ratio:.3g}x: TTFT {_number(line.ttft_ms)} ms instead of "
        f"{_number(full.ttft_ms)} ms ({line.ttft_speedup:.3g}x), paid for after "
        f"{'less than one read' if reads < 1 else f'{reads:,.1f} reads'} of {load.hits:g}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
