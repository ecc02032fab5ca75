"""`nutgraf bench`: the benchmark suites as commands."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import typer
from rich.console import Console

from ...compressors import FidelityConfig
from ..baselines import BASELINES
from ..costs.costs import decoder_shape
from ..costs.roofline import measure
from ..leaderboard import RATIOS, Budget, measure_all, one_of_each_method, train_all
from ..loading import dataset_name, find_records, pick_device, store_encoding
from ..methods import Compressed, EqualBudget, FullText, Method, NoContext, lines, named_methods
from ..quality.quality import Line, evaluate
from ..quality.reading import answer_swap, gold_positions
from ..quality.remaining import holds, remaining
from ..report.html import write_report
from ..report.leaderboard import write_leaderboard
from ..report.quality_tables import line_table
from ..report.table import rich_table, row_table
from ..rows import (
    RESULTS,
    Row,
    by_dataset,
    clean,
    command,
    commit,
    device_name,
    key_of,
    latest,
    paired,
    provenance,
    read_rows,
)
from ..speed.account import Case, Measurement, account
from ..speed.compressing import compress_rows
from ..speed.entrants import Entrant, find_entrants
from ..speed.speed import speed as speed_of_file
from ..speed.training import FAMILIES, Wanted, loss_memory, measure_step, recipe_settings
from ..studies.allocation import allocation_rows
from ..studies.gate import calibrate, gate_rows
from .expand import takes, wide_console
from .options import (
    AllocationOptions,
    CompressOptions,
    GateOptions,
    LeaderboardOptions,
    QualityOptions,
    ReadingOptions,
    ReportOptions,
    SpeedOptions,
    TrainingOptions,
)

RANDOM_RATIOS = (4.0, 16.0, 32.0, 512.0)  # of random slots, by default
COMPRESS_KEY = ("test", "method", "ratio_asked", "reader", "threads", "passages", "context_tokens")
TRAINING_KEY = (
    "test", "objective", "method", "reader_shape", "reader", "device", "dtype", "threads", "batch", "n",
    "target_tokens_asked", "vocabulary", "questions",
)  # fmt: skip
bench_app = typer.Typer(no_args_is_help=True, help="Measure quality, speed and cost on equal terms.")


def show(rows: Sequence[Row], keys: str, title: str = "") -> None:
    """Print rows by some of their keys."""
    wide_console().print(row_table(rows, keys, title))


# -- quality ---------------------------------------------------------------------------------------------------------


@bench_app.command()
@takes(QualityOptions)
def quality(asked: QualityOptions) -> None:
    """Answers from compressed passages, between full text and no context, next to plain text of the same length."""
    if asked.resume and asked.out is None:
        raise ValueError("--resume continues what --out holds; give --out.")
    dataset, records = asked.questions(asked.passages)
    settings = asked.settings(dataset, beta=asked.beta, ttft=asked.ttft, likelihood=asked.likelihood)
    encodings = [store_encoding(precision) for precision in asked.store_precision]
    names = [name for name in (BASELINES if asked.baseline is None else asked.baseline) if name != "none"]
    reader = asked.load_reader()
    made = asked.lines(reader)
    if encodings and all(method.compressor.interface == "text" for method in made):
        raise ValueError("--store-precision needs a --compressor that makes slots; text is stored as it is.")
    methods = lines(made, baselines=names, shuffled=asked.shuffled, seed=asked.seed, encodings=encodings)
    if asked.baselines_of is not None:
        if asked.baselines_of not in (known := sorted({method.name for method in made})):
            raise ValueError(
                f"--baselines-of {asked.baselines_of}: no --compressor is of this method; there are "
                f"{', '.join(known) or 'none'}."
            )
        methods = [m for m in methods if not isinstance(m, EqualBudget) or m.of.name == asked.baselines_of]
    before = [row for row in asked.have() if row.get("half") == asked.half] if asked.resume else []
    todo = remaining(methods, before, reader, records, settings) if asked.resume else methods
    if not todo:
        typer.echo(f"{asked.out} holds all {len(methods)} lines of {dataset}.")
        return
    there = {method.name for method in todo[:2] if holds(before, method, reader, settings)}
    rows: list[Row] = []

    def keep(line: Line) -> None:
        rows.append(asked.tag(line.row))
        if line.method not in there:
            asked.keep(rows[-1:])

    evaluate(reader, todo, records, settings, keep)
    if asked.out is not None:
        typer.echo(f"{len(rows) - len(there)} rows appended to {asked.out}.")
    Console().print(rich_table(line_table(rows, f"{dataset}, {rows[0]['n']} questions")))
    if asked.report is not None:
        typer.echo(f"Report: {write_report(asked.report, rows)}")


@bench_app.command()
@takes(ReadingOptions)
def reading(asked: ReadingOptions) -> None:
    """Does the reader read? The gold passage moved among distractors, and the answer replaced by another."""
    dataset, records = asked.questions()
    reader, settings = asked.load_reader(), asked.settings(dataset)
    methods: list[Method] = [FullText(), *asked.lines(reader)]
    rows = gold_positions(reader, methods, records, settings, asked.position) if asked.move else []
    rows += answer_swap(reader, [*methods, NoContext()], records, settings) if asked.swap else []
    rows = [asked.tag(row) for row in rows]
    asked.keep(rows, say=True)
    show(rows, "method ratio_asked test position n em f1 em_old em_before follows")


@bench_app.command()
@takes(AllocationOptions)
def allocation(asked: AllocationOptions) -> None:
    """A budget of slots over several passages: one ratio for all of them, or slots by retrieval score."""
    dataset, records = asked.questions(asked.passages)
    reader = asked.load_reader()
    methods = asked.lines(reader, "Name a compressor whose slots are divided, such as --compressor icae-smollm2@8.")
    rows = allocation_rows(
        reader,
        methods,
        records,
        asked.settings(dataset),
        scorers=asked.score,
        temperatures=asked.temperature,
        lowest=asked.lowest,
        on_row=lambda row: asked.keep([asked.tag(row)]),
    )
    show(rows, "method ratio_asked allocation score temperature reader_tokens f1 f1_minus_uniform nll_minus_uniform")


@bench_app.command()
@takes(GateOptions)
def gate(asked: GateOptions) -> None:
    """Send passages that compression damaged as text: the gate vs. random choices and vs. slots alone."""
    settings = asked.settings(" + ".join(map(dataset_name, asked.file)))
    dev = [record for name in asked.tune or asked.file for record in find_records(name, "tune", asked.limit)]
    records = [record for name in asked.file for record in find_records(name, asked.half, asked.limit)]
    config = FidelityConfig(signals=tuple(asked.signal)) if asked.signal else FidelityConfig()
    methods = asked.lines(
        asked.load_reader(), "A gate judges a compressor's passages: name one, such as --compressor icae-smollm2@4."
    )
    for method in methods:
        fitted = calibrate(method, dev, settings, config, asked.target, asked.priced)
        if asked.save is not None:
            fitted.save_pretrained(asked.save / method.label.replace(" ", "-") if len(methods) > 1 else asked.save)
        lower = [m for m in methods if m.compressor is method.compressor and (m.ratio or 0) < (method.ratio or 0)]
        lower += [Compressed(method.compressor, ratio) for ratio in asked.alone]
        found = gate_rows(fitted, method, records, settings, shares=asked.share, seeds=asked.seeds, slots_alone=lower)
        rows = [asked.tag(row) | {"calibrated_by": asked.target, "priced": asked.priced} for row in found]
        asked.keep(rows, say=True)
        show(
            rows,
            "method ratio_asked sending level share reader_tokens f1 f1_minus_random f1_minus_random_low f1_minus_random_high "
            "f1_minus_shortest f1_minus_slots auc",
        )


# -- speed -----------------------------------------------------------------------------------------------------------


@bench_app.command()
@takes(SpeedOptions)
def speed(asked: SpeedOptions) -> None:
    """Time to first token and decoding: over a file's passages, or at context lengths given by numbers.

    With --context (and --shape for a reader of random weights) every row is a full account: compress, load, lay out, prefill,
    decode, memory, operations, bytes, the distance to the device's roofline, and the reads after which compressing pays.
    Rows that --out holds are not measured again, so a run can be interrupted and resumed.
    """
    if asked.context:
        if asked.file is not None:
            raise ValueError(f"Give a file or --context, not both; got {asked.file} and {asked.context}.")
        _account(asked)
        return
    if asked.file is None or asked.shape is not None:
        raise ValueError("Give a file of questions (or `sample`), or lengths by --context, with --reader or --shape.")
    records, reader = find_records(asked.file, asked.half), asked.load_reader()
    rows = speed_of_file(
        reader,
        [Entrant.of(line) for line in asked.lines(reader)],
        records,
        passages=asked.passages or (1, 2, 4, 6, 8, 10),
        requests=asked.requests,
        repeats=asked.repeats,
        decode_tokens=asked.decode_tokens,
        dataset=dataset_name(asked.file),
        seed=asked.seed,
        roofline=measure(str(reader.device), str(reader.dtype).removeprefix("torch.")),
    )
    asked.keep(rows, say=True)
    show(rows, "method ratio_asked passages context_tokens ttft_ms ttft_online_ms decode_ms_per_token")
    if asked.report is not None:
        typer.echo(f"Report: {write_report(asked.report, rows)}")


def _account(asked: SpeedOptions) -> None:
    cases = [Case(c, p, b) for c in asked.context for p in asked.passages or [10] for b in asked.batch]
    reader = asked.load_reader()
    entrants = find_entrants(
        reader,
        asked.compressor,
        asked.slots or (() if asked.compressor else RANDOM_RATIOS),
        asked.interface,
        untrained=asked.shape is not None,
        spec_ratios=asked.ratio,
    )
    shape = decoder_shape(reader.model.config, asked.shape or reader.name)
    roofline = measure(str(reader.device), str(reader.dtype).removeprefix("torch."))
    typer.echo(
        f"{shape.name}, {shape.parameters / 1e6:,.1f} M weights{' (random)' if asked.shape else ''}, {roofline.dtype} on "
        f"{reader.device}: {roofline.flops / 1e12:.3g} TFLOP/s in products, {roofline.bandwidth / 1e9:.3g} GB/s copying."
    )

    def keep(rows: list[Row]) -> None:
        asked.keep(rows)
        title = "{context_tokens:,} tokens in {passages} passages, {batch} at a time".format(**rows[0])
        show(
            rows,
            "method ratio_asked interface slots compress_ms load_ms plan_ms prefill_ms ttft_ms ttft_speedup roofline_share "
            "decode_ms_per_token requests_per_s bytes_per_passage break_even_reads",
            title,
        )

    how = Measurement(
        reader, shape, roofline, asked.repeats, asked.warmup, asked.decode_tokens, asked.shape is not None, asked.seed
    )
    found = account(how, entrants, cases, have=asked.have(), keep=keep, say=lambda text: typer.echo(text, err=True))
    written = f" appended to {asked.out}" if asked.out is not None else ""
    typer.echo(f"{len(found)} rows{written}; rows that exist are not measured again (--again does).")


@bench_app.command()
@takes(CompressOptions)
def compress(asked: CompressOptions) -> None:
    """Compress passages of mixed lengths, vs. a bare forward pass of the encoder's layers over the same tokens.

    Rows that --out holds are not measured again, so a run can be interrupted and resumed.
    """
    texts = list(dict.fromkeys(text for record in find_records("sample") for text in record.passages))
    if not 1 <= asked.passages <= len(texts):
        raise ValueError(f"The sample holds {len(texts)} different passages; got --passages {asked.passages}.")
    texts = random.Random(asked.seed).sample(texts, asked.passages)
    reader, done = asked.load_reader(), {key_of(row, COMPRESS_KEY) for row in asked.have()}
    about = {
        "test": "compress",
        "reader": reader.fingerprint,
        "threads": torch.get_num_threads() if reader.device.type == "cpu" else None,
        "passages": asked.passages,
        "context_tokens": sum(map(len, reader.tokenize_batch(texts))),
    }
    shown: list[Row] = []
    for entrant in find_entrants(reader, asked.compressor, (), (), untrained=asked.shape is not None):
        if key_of(about | {"method": entrant.method, "ratio_asked": entrant.ratio}, COMPRESS_KEY) in done:
            continue
        rows = compress_rows(reader, [entrant], texts, repeats=asked.repeats, seed=asked.seed)
        if not rows:
            typer.echo(f"{entrant.method} has no encoder of its own and is left out.", err=True)
        asked.keep(rows)
        shown += rows
    keys = "method ratio_asked encoder_tokens compress_ms bare_ms plain_ms bare_share tokens_per_s"
    show(shown, keys, f"{asked.passages} passages")


@bench_app.command()
@takes(TrainingOptions)
def training(asked: TrainingOptions) -> None:
    """Cost of a training step vs. a bare forward and backward pass over the same tokens, and memory of the losses.

    Rows that --out holds are not measured again, so a run can be interrupted and resumed.
    """
    done = {key_of(row, TRAINING_KEY) for row in asked.have()}

    def keep(row: Row) -> None:
        asked.keep([row])
        show(
            [clean(row)],
            "method objective questions target_tokens vocabulary step_ms teacher_ms bare_ms step_cost tokens_per_s "
            "bare_tokens_per_s prompts_per_s "
            "peak_bytes chunk extra_bytes bound_bytes whole_bytes",
        )

    if asked.memory:
        _loss_memory(asked, done, keep)
        return
    reader = asked.load_reader()
    for method in asked.compressor:
        for family in asked.objective or FAMILIES:
            head = {
                "suite": "training",
                "test": "step",
                "reader_shape": decoder_shape(reader.model.config, asked.shape or reader.name).name,
                "weights": "random" if asked.shape else None,
                "threads": torch.get_num_threads() if reader.device.type == "cpu" else None,
                "batch": asked.batch_size,
                "method": method,
                "objective": family,
                "questions": asked.questions if family in ("answers", "kl", "kl-cached") else None,
                "n": asked.steps,
                **provenance(reader, asked.seed),
            }
            if key_of(clean(head), TRAINING_KEY) not in done:
                wanted = Wanted(
                    method,
                    family,
                    recipe_settings(method),
                    asked.steps,
                    batch_size=asked.batch_size,
                    questions=asked.questions,
                )
                keep(head | measure_step(reader, wanted, seed=asked.seed))


def _loss_memory(asked: TrainingOptions, done: set[tuple[object, ...]], keep: Callable[[Row], None]) -> None:
    device = pick_device(asked.device)
    torch.manual_seed(asked.seed)
    about = {"suite": "training", "test": "loss-memory", "vocabulary": 128256, "command": command(), "commit": commit()}
    about |= {"device": device_name(device), "dtype": "float32", "seed": asked.seed}
    for family in asked.objective or ("lm", "kl"):
        for tokens in asked.memory:
            head: Row = about | {"objective": family, "target_tokens_asked": tokens}
            if key_of(head, TRAINING_KEY) not in done:
                keep(head | loss_memory(family, tokens, device=device))


# -- the leaderboard -------------------------------------------------------------------------------------------------


@bench_app.command()
@takes(LeaderboardOptions)
def leaderboard(asked: LeaderboardOptions) -> None:
    """Train a recipe of every method for the same budget on one reader, and measure all at the same ratios.

    Beside them stand the full text, no context, methods without training and the passages' first tokens. Run it again to go on
    where it stopped.
    """
    if not asked.questions:
        raise ValueError("Give the question files to measure on: --eval dev.jsonl, repeatable.")
    budget, ratios = Budget(asked.minutes, asked.steps), asked.ratio or list(RATIOS)
    reader = asked.load_reader()
    beside = named_methods(reader, asked.compressor, ratios)
    entries = train_all(
        asked.recipe or one_of_each_method(),
        [f"reader={asked.reader}", *(asked.given or [])],
        reader,
        budget,
        asked.runs,
        max_minutes=asked.max_minutes,
        say=typer.echo,
    )
    if entries is None:
        return
    asked.out = asked.out or asked.runs / "leaderboard.jsonl"
    for file in asked.questions:
        for half in [asked.half] if asked.half else ["tune", "report"]:
            records = find_records(file, half, asked.limit)
            settings = asked.settings(dataset_name(file), likelihood=False)
            have = [row for row in asked.have() if row.get("half") == half]

            def keep(row: Row, half: str = half) -> None:
                asked.keep([row | {"half": half}])

            measure_all(
                reader,
                entries,
                beside,
                records,
                settings,
                ratios,
                have,
                keep,
            )
    for path in write_leaderboard(asked.runs, read_rows(asked.out), budget.minutes, budget.steps):
        typer.echo(str(path))


# -- the report ------------------------------------------------------------------------------------------------------


@bench_app.command("report")
@takes(ReportOptions)
def report_command(asked: ReportOptions) -> None:
    """One HTML file of results rows, and their tables."""
    rows = [
        r for r in read_rows(asked.files or [RESULTS]) if asked.dataset is None or r.get("dataset") == asked.dataset
    ]
    groups = by_dataset(latest(paired(rows)))
    timed = [row for group in groups.values() for row in group]
    for name, group in groups.items():
        Console().print(rich_table(line_table(group, name, timed)))
    typer.echo(f"Report: {write_report(asked.out, rows)}")
