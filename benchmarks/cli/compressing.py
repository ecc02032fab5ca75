"""`nutgraf bench compress`: options in, rows and a table out."""

from __future__ import annotations

import random
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from ..costs.shapes import random_reader
from ..loading import find_reader, find_records
from ..rows import append_rows, read_rows
from ..speed.compressing import compress_rows
from ..speed.entrants import find_entrants
from .options import Again, Device, Dtype, Out, ReaderName, friendly_errors, wide_console

KEY = ("test", "method", "ratio_asked", "reader", "device", "dtype", "threads", "passages", "context_tokens")


def compress(
    compressor: Annotated[list[str], typer.Option(help="NAME or NAME@RATIO; with --shape methods. Repeatable.")],
    reader: ReaderName = "reader-small",
    shape: Annotated[str | None, typer.Option(help="A reader of this shape with random weights.")] = None,
    passages: Annotated[int, typer.Option(help="Passages in one call, drawn from the sample's.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    again: Again = False,
    out: Out = None,
) -> None:
    """Compressing passages of mixed lengths, beside a bare forward pass of the encoder's layers over the same tokens.

    Rows that --out holds are not measured again, so a run can be stopped and gone on with.
    """
    with friendly_errors():
        texts = list(dict.fromkeys(text for record in find_records("sample") for text in record.passages))
        if not 1 <= passages <= len(texts):
            raise ValueError(f"The sample holds {len(texts)} different passages; got --passages {passages}.")
        texts = random.Random(seed).sample(texts, passages)
        loaded = (
            random_reader(shape, device=device, dtype=dtype, seed=seed) if shape else find_reader(reader, device, dtype)
        )
        table = Table(title=f"{passages} passages", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("method", "tokens", "compress ms", "bare ms", "without LoRA", "bare / compress", "tokens/s"):
            table.add_column(name, justify="left" if name == "method" else "right")
        have = read_rows(out) if out is not None and out.exists() and not again else []
        done = {tuple(row.get(key) for key in KEY) for row in have}
        tokens = sum(map(len, loaded.tokenize_batch(texts)))
        for entrant in find_entrants(loaded, compressor, (), (), untrained=shape is not None):
            about: dict[str, object] = {
                "test": "compress",
                "method": entrant.method,
                "ratio_asked": entrant.ratio,
                "passages": passages,
            }
            if _done(about | {"context_tokens": tokens, "reader": loaded.fingerprint}, done):
                continue
            rows = compress_rows(loaded, [entrant], texts, repeats=repeats, seed=seed)
            if not rows:
                typer.echo(f"{entrant.method} has no encoder of its own and is left out.", err=True)
            if out is not None:
                append_rows(out, rows)
            for row in rows:
                table.add_row(
                    f"{row['method']} {row.get('ratio_asked', '')}".strip(),
                    f"{row['encoder_tokens']:,}",
                    f"{row['compress_ms']:,.0f}",
                    f"{row['bare_ms']:,.0f}",
                    f"{row['plain_ms']:,.0f}" if "plain_ms" in row else "",
                    f"{row['bare_share']:.2f}",
                    f"{row['tokens_per_s']:,.0f}",
                )
        wide_console().print(table)


def _done(about: dict[str, object], done: set[tuple[object, ...]]) -> bool:
    """Whether a row of the results file is about the same; device, dtype and threads are the machine's."""
    import torch

    wanted = {**about, "threads": torch.get_num_threads()}
    fixed = [i for i, key in enumerate(KEY) if key in wanted]
    return any(all(row[i] == wanted[KEY[i]] for i in fixed) for row in done)
