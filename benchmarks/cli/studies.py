"""`nutgraf bench gate`: calibrate a fidelity gate on one half of the questions, and judge it on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...compressors import FidelityConfig
from ..loading import dataset_name, find_reader, find_records
from ..methods import Compressed, named_methods
from ..quality.quality import Settings, label
from ..studies.gate import SHARES, calibrate, gate_line, gate_rows
from .options import Batch, Device, Dtype, Limit, Out, Ratios, ReaderName, Tokens, friendly_errors, keep


def gate(
    file: Annotated[
        list[str],
        typer.Argument(
            help="Questions (.jsonl or .jsonl.xz) with halves `tune` and `report`; several are taken together."
        ),
    ],
    reader: ReaderName = "reader-small",
    compressor: Annotated[
        list[str],
        typer.Option("--compressor", help="NAME or NAME@RATIO,RATIO; a gate for each, the lower ones compared with."),
    ] = [],  # noqa: B006 (typer copies it)
    ratio: Ratios = [],  # noqa: B006
    tune: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on the tune half of this file, repeatable; default that of each FILE."),
    ] = None,
    half: Annotated[str, typer.Option(help="Report on this half.")] = "report",
    limit: Limit = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Shares of passages sent as text; default 5 to 90 %.")
    ] = None,
    alone: Annotated[
        list[float] | None, typer.Option(help="Compare with slots alone at this lower ratio as well, repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Random sendings beside each of the gate's.")] = 20,
    signal: Annotated[list[str] | None, typer.Option(help="What the gate measures, repeatable; default all.")] = None,
    target: Annotated[
        str, typer.Option(help="Calibrate on the loss of f1, or of the reference answer's probability (weak readers).")
    ] = "f1",
    priced: Annotated[
        bool, typer.Option("--priced/--unpriced", help="Go by what is lost for each token saved, or by what is lost.")
    ] = True,
    max_new_tokens: Tokens = 24,
    batch_size: Batch = 16,
    seed: Annotated[int, typer.Option(help="Seed of random sending and of intervals.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    save: Annotated[
        Path | None, typer.Option(help="Folder for the calibrated gate; of several, one below it for each.")
    ] = None,
    out: Out = None,
) -> None:
    """Passages that did not survive compression as text: the gate against random sending and against slots alone."""
    with friendly_errors():
        settings = Settings(" + ".join(map(dataset_name, file)), max_new_tokens, batch_size, seed=seed)
        dev = [record for name in tune or file for record in find_records(name, "tune", limit)]
        records = [record for name in file for record in find_records(name, half, limit)]
        config = FidelityConfig(signals=tuple(signal)) if signal else FidelityConfig()
        methods = named_methods(find_reader(reader, device, dtype), compressor, ratio)
        if not methods:
            raise ValueError("A gate judges a compressor's passages: name one, such as --compressor mean-pool-small@4.")
        for method in methods:
            fitted = calibrate(method, dev, settings, config, target, priced)
            if save is not None:
                fitted.save_pretrained(save / label(method).replace(" ", "-") if len(methods) > 1 else save)
            lower = [m for m in methods if m.compressor is method.compressor and (m.ratio or 0) < (method.ratio or 0)]
            lower += [Compressed(method.compressor, each) for each in alone or ()]
            found = gate_rows(fitted, method, records, settings, shares=share or SHARES, seeds=seeds, slots_alone=lower)
            rows = [row | {"half": half, "calibrated_by": target, "priced": priced} for row in found]
            keep(rows, out)
            for row in rows:
                typer.echo(gate_line(row))
