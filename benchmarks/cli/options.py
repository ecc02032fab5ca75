# ruff: noqa: RUF009 (`many` makes a dataclass field)
"""Options of the benchmark commands: one dataclass per suite, which `expand.takes` turns into typer's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ..baselines import BASELINES
from ..costs.shapes import random_reader
from ..loading import dataset_name, find_reader, find_records
from ..methods import Compressed, named_methods
from ..quality.quality import Settings
from ..rows import Row, append_rows, read_rows
from ..speed.training import FAMILIES
from ..studies.allocation import SCORERS
from ..studies.gate import SHARES

Names = list[str]
Numbers = list[float]
Counts = list[int]


def many(*values: Any) -> Any:
    """Default of a repeatable option."""
    return field(default_factory=lambda: list(values))


@dataclass(kw_only=True)
class Run:
    """Options of every command that measures."""

    reader: Annotated[str, Option(help="A shipped reader, a folder or a hub id.")] = "reader-smollm2"
    device: Annotated[str, Option(help="Where to run: auto, cpu, cuda, ...")] = "auto"
    dtype: Annotated[str, Option(help="auto (float32 on the CPU), float32, bfloat16 or float16.")] = "auto"
    seed: Annotated[int, Option(help="Seed of draws, controls and intervals.")] = 0
    out: Annotated[Path | None, Option(help="Results file to append rows to.")] = None

    def load_reader(self) -> Reader:
        """The reader asked for; a random one if the suite has a `shape`."""
        if shape := getattr(self, "shape", None):
            return random_reader(shape, device=self.device, dtype=self.dtype, seed=self.seed)
        return find_reader(self.reader, self.device, self.dtype)

    def keep(self, rows: list[Row], say: bool = False) -> None:
        """Append rows to the results file, if there is one."""
        if self.out is not None:
            append_rows(self.out, rows)
            if say:
                typer.echo(f"{len(rows)} rows appended to {self.out}.")

    def have(self) -> list[Row]:
        """The rows of the results file; none with `--again`."""
        there = self.out is not None and self.out.exists() and not getattr(self, "again", False)
        return read_rows(self.out) if there and self.out is not None else []


@dataclass(kw_only=True)
class Named(Run):
    """Options of suites over named compressors."""

    compressor: Annotated[
        Names, Option(help="NAME or NAME@RATIO,RATIO: a shipped one, a folder, a hub id, a method without training.")
    ] = many()
    ratio: Annotated[Numbers, Option(help="Ratio of compressors that name none.")] = many()
    half: Annotated[str | None, Option(help="Only questions of this half (`tune` or `report`).")] = None

    def lines(self, reader: Reader, needed: str = "") -> list[Compressed]:
        """The compressors at their ratios. Raises ValueError with `needed` if there are none."""
        found = named_methods(reader, self.compressor, self.ratio)
        if needed and not found:
            raise ValueError(needed)
        return found

    def tag(self, row: Row) -> Row:
        """The row with the half asked for."""
        return row | ({"half": self.half} if self.half else {})


@dataclass(kw_only=True)
class Answers(Named):
    """Options of suites that answer questions."""

    limit: Annotated[int | None, Option(help="At most this many questions, evenly spread over each file.")] = None
    max_new_tokens: Annotated[int, Option(help="Longest answer.")] = 24
    batch_size: Annotated[int, Option(help="Prompts read at a time.")] = 16

    def settings(self, dataset: str, **more: Any) -> Settings:
        """Settings of the quality suite."""
        return Settings(dataset, self.max_new_tokens, self.batch_size, seed=self.seed, **more)


@dataclass(kw_only=True)
class OfFile(Answers):
    """Options of suites over one question file."""

    file: Annotated[str, Argument(help="Questions (.jsonl or .jsonl.xz), or `sample` for the shipped ones.")]

    def questions(self, passages: int | None = None) -> tuple[str, list[Record]]:
        """Name of the set, and its records, with `passages` passages each if given."""
        name = dataset_name(self.file) + (f", {passages} passages" if passages else "")
        return name, find_records(self.file, self.half, self.limit, passages=passages)


PASSAGES = "Passages per question: distractors are cut, or topped up from other questions."


@dataclass(kw_only=True)
class QualityOptions(OfFile):
    passages: Annotated[int | None, Option(help=PASSAGES)] = None
    baseline: Annotated[
        Names | None, Option(help=f"Equal-budget baselines: {', '.join(BASELINES)}, none; default all.")
    ] = None
    baselines_of: Annotated[
        str | None, Option(help="Baselines under the budgets of this method only; default of every method.")
    ] = None
    shuffled: Annotated[bool, Option(help="Also read another question's compressed passages.")] = True
    store_precision: Annotated[
        Names, Option(help="Also read slots rounded by a store: int8, int4, float16, bfloat16.")
    ] = many()
    ttft: Annotated[int, Option(help="Questions to time to the first token, slots in memory.")] = 0
    likelihood: Annotated[bool, Option(help="Also perplexity and KL of the reference answers: half the reading.")] = (
        True
    )
    beta: Annotated[float, Option(help="Weight of recall in ROUGE-L.")] = 1.0
    resume: Annotated[
        bool, Option(help="Leave out lines in --out that the same code and weights measured on the same questions.")
    ] = False
    report: Annotated[Path | None, Option(help="Also write an HTML report of these rows.")] = None


@dataclass(kw_only=True)
class ReadingOptions(OfFile):
    position: Annotated[Counts | None, Option(help="Positions of the gold passage, from 0; default all.")] = None
    swap: Annotated[bool, Option(help="Replace the answer in the passages by another of the same kind.")] = True
    move: Annotated[bool, Option(help="Move the gold passage among its distractors.")] = True


@dataclass(kw_only=True)
class AllocationOptions(OfFile):
    passages: Annotated[int, Option(help=PASSAGES)] = 4
    score: Annotated[Names, Option(help=f"Retrieval score: {', '.join(SCORERS)}, gold.")] = many("embedder")
    temperature: Annotated[Numbers, Option(help="Lower gives the best passages more.")] = many(1.0)
    lowest: Annotated[float, Option(help="Lowest compression ratio of a passage.")] = 1.0


@dataclass(kw_only=True)
class GateOptions(Answers):
    file: Annotated[
        Names, Argument(help="Questions with halves `tune` and `report`; several files are taken together.")
    ]
    tune: Annotated[Names, Option(help="Calibrate on the tune half of this file; default that of each FILE.")] = many()
    half: Annotated[str, Option(help="Report on this half.")] = "report"  # type: ignore[assignment]
    share: Annotated[Numbers, Option(help="Shares of passages sent as text.")] = many(*SHARES)
    alone: Annotated[Numbers, Option(help="Also compare with slots alone at this lower ratio.")] = many()
    seeds: Annotated[int, Option(help="Random choices next to each of the gate's.")] = 20
    signal: Annotated[Names, Option(help="What the gate measures; default all.")] = many()
    target: Annotated[str, Option(help="Calibrate on the loss of f1, or of the reference answer's probability.")] = "f1"
    priced: Annotated[bool, Option("--priced/--unpriced", help="Go by the loss per token saved, or by the loss.")] = (
        True
    )
    save: Annotated[
        Path | None, Option(help="Folder for the calibrated gate; a folder within it for each of several.")
    ] = None


SHAPE = "A reader of this shape with random weights: llama-1b, llama-3b, llama-8b, ..."
AGAIN = "Measure rows again that --out holds."


@dataclass(kw_only=True)
class SpeedOptions(Named):
    file: Annotated[str | None, Argument(help="Questions with real passages; without, give --context.")] = None
    passages: Annotated[Counts, Option(help="Numbers of passages; default 1, 2, 4, 6, 8, 10, with --context 10.")] = (
        many()
    )
    context: Annotated[Counts, Option(help="Tokens of all passages together.")] = many()
    shape: Annotated[str | None, Option(help=SHAPE)] = None
    slots: Annotated[
        Numbers,
        Option(help="Ratio of random slots (--context); default without --compressor 4, 16, 32, 512."),
    ] = many()
    interface: Annotated[Names, Option(help="Of random slots: embeds, kv.")] = many("embeds")
    batch: Annotated[Counts, Option(help="Prompts at a time (--context).")] = many(1)
    requests: Annotated[int, Option(help="Different requests at each number of passages.")] = 3
    repeats: Annotated[int, Option(help="Rounds over all requests and methods that count.")] = 5
    warmup: Annotated[int, Option(help="Rounds before them (--context).")] = 1
    again: Annotated[bool, Option("--again", help=AGAIN)] = False
    decode_tokens: Annotated[int, Option(help="Tokens to decode.")] = 16
    report: Annotated[Path | None, Option(help="Also write an HTML report of these rows.")] = None


@dataclass(kw_only=True)
class CompressOptions(Run):
    compressor: Annotated[Names, Option(help="NAME or NAME@RATIO; with --shape methods.")]
    shape: Annotated[str | None, Option(help=SHAPE)] = None
    passages: Annotated[int, Option(help="Passages per call, drawn from the sample's.")] = 64
    repeats: Annotated[int, Option(help="Rounds that count.")] = 5
    again: Annotated[bool, Option("--again", help=AGAIN)] = False


@dataclass(kw_only=True)
class TrainingOptions(Run):
    compressor: Annotated[Names, Option(help="Methods, with random weights.")] = many("icae")
    objective: Annotated[Names, Option(help=f"Objectives: {', '.join(FAMILIES)}; default all.")] = many()
    shape: Annotated[str | None, Option(help=SHAPE)] = None
    steps: Annotated[int, Option(help="Timed steps; items are drawn 16 batches at a time.")] = 32
    batch_size: Annotated[int, Option(help="Items per step.")] = 8
    questions: Annotated[int, Option(help="Questions per passage, for the objectives answers, kl and kl-cached.")] = 3
    memory: Annotated[
        Counts, Option(help="Instead: memory of the losses over this many target tokens, vocabulary 128,256.")
    ] = many()
    again: Annotated[bool, Option("--again", help=AGAIN)] = False


@dataclass(kw_only=True)
class LeaderboardOptions(Answers):
    given: Annotated[
        list[str] | None, Argument(metavar="SETTINGS", help="Settings of every recipe, as in data.dir=corpus seed=1.")
    ] = None
    questions: Annotated[Names, Option("--eval", help="Question file with halves `tune` and `report`.")] = many()
    recipe: Annotated[Names, Option(help="Recipe to train; default one of each method.")] = many()
    minutes: Annotated[float | None, Option(help="Training budget of each recipe, on this machine.")] = None
    steps: Annotated[int | None, Option(help="Instead: its optimiser steps.")] = None
    runs: Annotated[Path, Option("--runs", help="Folder of the runs, the rows, the table and the picture.")] = Path(
        "runs/leaderboard"
    )
    compressor: Annotated[Names, Option(help="Measured beside, NAME or NAME@RATIO,RATIO.")] = many(
        "kv-match", "llmlingua2-small", "selective-context"
    )
    half: Annotated[str | None, Option(help="Only this half of the questions; default tune and report.")] = None
    max_minutes: Annotated[float | None, Option(help="Stop training cleanly after this many minutes in all.")] = None


@dataclass(kw_only=True)
class ReportOptions:
    files: Annotated[list[Path] | None, Argument(help="Results files or folders; default the committed ones.")] = None
    out: Annotated[Path, Option(help="The HTML file.")] = Path("reports/report.html")
    dataset: Annotated[str | None, Option(help="Only rows of this dataset.")] = None
