"""`nutgraf bench speed` at context lengths given by numbers: options in, rows and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich import box
from rich.table import Table

from ..costs.costs import decoder_shape
from ..costs.roofline import measure
from ..costs.shapes import random_reader
from ..loading import find_reader
from ..rows import Row, append_rows, read_rows
from ..speed.account import Measurement, account
from ..speed.account_rows import Case
from ..speed.entrants import find_entrants
from .options import wide_console

RATIOS = (4.0, 16.0, 32.0, 512.0)  # of random slots, where nothing else is asked for


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; see `nutgraf bench speed --help`."""

    reader: str
    shape: str | None
    compressors: Sequence[str]
    ratios: Sequence[float]
    slots: Sequence[float]
    interfaces: Sequence[str]
    contexts: Sequence[int]
    passages: Sequence[int]
    batches: Sequence[int]
    repeats: int
    warmup: int
    decode_tokens: int
    seed: int
    device: str
    dtype: str
    out: Path | None
    again: bool


def run_account(asked: Asked) -> list[Row]:
    """Measure what is asked for and is not in the results file yet; rows go there as soon as they are there.

    Raises:
        ValueError: for anything asked for that cannot be measured.
    """
    cases = [Case(c, p, b) for c in asked.contexts for p in asked.passages for b in asked.batches]
    if asked.shape is None:
        reader = find_reader(asked.reader, asked.device, asked.dtype)
    else:
        reader = random_reader(asked.shape, device=asked.device, dtype=asked.dtype, seed=asked.seed)
    ratios = asked.slots or (() if asked.compressors else RATIOS)
    entrants = find_entrants(
        reader,
        asked.compressors,
        ratios,
        asked.interfaces,
        untrained=asked.shape is not None,
        spec_ratios=asked.ratios,
    )
    shape = decoder_shape(reader.model.config, asked.shape or reader.name)
    roofline = measure(str(reader.device), str(reader.dtype).removeprefix("torch."))
    typer.echo(
        f"{shape.name}, {shape.parameters / 1e6:,.1f} M weights{' (random)' if asked.shape else ''}, {roofline.dtype} on "
        f"{reader.device}: {roofline.flops / 1e12:.3g} TFLOP/s in products, {roofline.bandwidth / 1e9:.3g} GB/s copying."
    )
    have = read_rows(asked.out) if asked.out is not None and asked.out.exists() and not asked.again else []

    def keep(rows: list[Row]) -> None:
        if asked.out is not None:
            append_rows(asked.out, rows)
        wide_console().print(account_table(rows))

    how = Measurement(
        reader,
        shape,
        roofline,
        repeats=asked.repeats,
        warmup=asked.warmup,
        decode_tokens=asked.decode_tokens,
        random_weights=asked.shape is not None,
        seed=asked.seed,
    )
    found = account(how, entrants, cases, have=have, keep=keep, say=lambda text: typer.echo(text, err=True))
    written = f" appended to {asked.out}" if asked.out is not None else ""
    typer.echo(f"{len(found)} rows{written}; what was there already is not measured again (--again does).")
    return found


def account_table(rows: Sequence[Row]) -> Table:
    """The rows of one case for `rich`."""
    first = rows[0]
    title = f"{first['context_tokens']:,.0f} tokens in {first['passages']} passages, {first['batch']} at a time"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    names = (
        "method",
        "slots",
        "compress\nms",
        "load\nms",
        "build\nms",
        "prefill\nms",
        "TTFT\nms",
        "x full",
        "roofline\n%",
    )
    for number, name in enumerate((*names, "token\nms", "requests\n/s", "passage\nKB", "paid at\nreads")):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        full = row["method"] == "full"
        pays = f"{row['break_even_reads']:,.1f}" if "break_even_reads" in row else "never"
        table.add_row(
            "full text" if full else f"{row['method']} {row.get('ratio_asked', row['ratio']):g}x {row['interface']}",
            "" if full else f"{row['slots']:,}",
            *(_ms(row, key) for key in ("compress_ms", "load_ms", "plan_ms", "prefill_ms", "ttft_ms")),
            f"{row['ttft_speedup']:.2f}",
            f"{100 * row['roofline_share']:.0f}",
            _ms(row, "decode_ms_per_token"),
            f"{row['requests_per_s']:.2f}",
            f"{row['bytes_per_passage'] / 1e3:,.1f}",
            "" if full else pays,
        )
    return table


def _ms(row: Row, key: str) -> str:
    return f"{row[key]:,.1f}" if key in row else ""
