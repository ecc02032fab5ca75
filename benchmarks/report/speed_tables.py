"""Tables of speed and cost, the same in the report and on the page, from the newest row of each line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..names import method_name, with_ratio
from ..rows import Row, key_of, newest
from .table import Column, Table, build, columns, milliseconds

FULL, RANDOM = "full", "random-slots"
SAME = ("device", "dtype", "threads")  # rows that differ here cannot be compared
CASE = ("reader_shape", "device", "context_asked", "passages", "batch")
OBJECTIVES = {"ae": "AE", "lm": "LM", "kl": "KL, live teacher", "kl-cached": "KL, teacher's logits from disk"}
SHAPES = ("llama-1b", "llama-3b", "llama-8b")


def speed_tables(rows: Iterable[Row]) -> list[Table]:
    """Every table that some row belongs to."""
    rows = list(rows)
    selection = [row | {"reader_shape": row.get("model")} for row in rows if row.get("suite") == "selection"]
    stored = [row | {"test": "answer"} for row in rows if row.get("suite") == "store" and row.get("state") == "answer"]
    losses = _newest(rows, "loss-memory", ("objective", "target_tokens_asked", "vocabulary"))
    made = (
        *_account_tables(rows),
        build(
            COMPRESS,
            _newest(rows, "compress", ("reader_shape", "method", "ratio_asked", "passages")),
            title="Compressing passages of mixed lengths",
            caption="Share of the throughput of a bare forward pass over the same tokens and slots.",
        ),
        build(
            SELECTION,
            _newest(selection, "speed", ("method", "mode", "model", "tokens", "passages")),
            title="Selecting tokens",
            caption="To the same kept share as llmlingua 0.2.2, with the same weights, text and threads, in turns.",
        ),
        build(
            STEP,
            _newest(rows, "step", ("reader_shape", "method", "objective", "batch", "questions")),
            title="A training step",
            caption="Over a bare forward and backward pass of the same tokens; the teacher's time is not part of the step.",
        ),
        build(
            LOSSES,
            [row for row in losses if "extra_bytes" in row],
            title="Memory of the losses",
            caption="Extra memory, forward and backward, with the bound that the chunk sets and the size of all logits.",
        ),
        build(
            STORE,
            _newest(stored, "answer", ("reader_shape", "method", "passages")),
            title="Reading from the store",
            caption="Warm reads, vs. the time to first token with passages in memory and vs. a plain copy in memory.",
        ),
    )
    return [table for table in made if table]


def missing(rows: Iterable[Row]) -> list[str]:
    """What has no row yet, in sentences."""
    account = [row for row in rows if row.get("test") == "account"]
    seen = {(row["reader_shape"], not str(row["device"]).startswith("cpu")) for row in account}
    gpu = [shape for shape in SHAPES if (shape, True) not in seen]
    out = [f"On a GPU: readers of the shapes {', '.join(gpu)}."] if gpu else []
    return out if ("llama-1b", False) in seen else [*out, "On the CPU: a reader of the 1B shape."]


def _account_tables(rows: Sequence[Row]) -> list[Table]:
    found = sorted(_newest(rows, "account", (*CASE, "method", "interface", "ratio_asked")), key=_place)
    batches = {key_of(row, CASE[:-1]) for row in found if row["batch"] > 1}
    full = {key_of(row, CASE): row["roofline_ms"] for row in found if row["method"] == FULL and "roofline_ms" in row}
    predicted = [
        row | {"predicted": full[key_of(row, CASE)] / row["roofline_ms"]}
        for row in found
        if row["method"] != FULL and "roofline_ms" in row and key_of(row, CASE) in full
    ]
    return [
        build(
            FIRST_TOKEN,
            [row for row in found if row["batch"] == 1],
            title="Time to the first token",
            caption="Passages are compressed ahead of time and loaded from disk; question and template are 64 tokens. Of the "
            "roofline: the least time that the device's rates allow, over the time taken.",
        ),
        build(
            BATCHES,
            [row for row in found if key_of(row, CASE[:-1]) in batches],
            title="Several prompts at a time",
            caption="TTFT is of the whole batch. Requests are answered in as many tokens as their rows say (`decode_tokens`).",
        ),
        build(
            MODEL,
            predicted,
            title="The cost model against measurements",
            caption="Speedup of TTFT as `nutgraf plan` estimates it (operations and bytes of a prefill over the device's "
            "rates), and as measured, with loading, tokenising and launching.",
        ),
    ]


def _newest(rows: Sequence[Row], test: str, about: tuple[str, ...]) -> list[Row]:
    chosen = [row for row in rows if row.get("test") == test]
    last = {row.get("reader_shape"): row.get("reader") for row in chosen}  # a retrained reader replaces the older one
    chosen = [row for row in chosen if row.get("reader") == last[row.get("reader_shape")]]
    return newest(chosen, (*SAME, *about))


def _place(row: Row) -> tuple[object, ...]:
    kind = (row["method"] != FULL, row["method"] == RANDOM, row["method"], row.get("ratio_asked") or 0)
    return (str(row["device"]), *(row[key] for key in CASE if key != "device"), *kind)


def _reader(row: Row) -> str:
    threads = f", {row['threads']} threads" if "threads" in row else ""
    device = "CPU" if str(row["device"]).startswith("cpu") else str(row["device"])
    return f"{row['reader_shape']}, {device}{threads}"


def _read_as(row: Row) -> str:
    if row["method"] == FULL:
        return "full text"
    name = "slots" if row["method"] == RANDOM else f"slots of {row['method']}"
    kind = ", keys and values" if row["interface"] == "kv" else ""
    return f"{row['slots']:,} {name}{kind} ({row['ratio']:.0f}x)"


def _pays(row: Row) -> str | None:
    reads = f"{row['break_even_reads']:,.1f} reads" if "break_even_reads" in row else "never"
    return None if row["method"] == FULL else reads


READER, READ_AS, TTFT = Column("reader", _reader), Column("read as", _read_as), milliseconds("TTFT", "ttft_ms")
FASTER = Column("faster", lambda row: None if row["method"] == FULL else row["ttft_speedup"], "{:.1f}x")
TOKENS = Column("tokens", "context_tokens", "{:,.0f}")
FIRST_TOKEN = (
    READER,
    Column("tokens, passages", lambda row: f"{row['context_tokens']:,.0f} in {row['passages']}"),
    READ_AS,
    Column("positions", "reader_tokens", "{:,.0f}"),
    TTFT,
    FASTER,
    Column("of the roofline", "roofline_share", "{:.0f} %", 100),
    Column("compressing pays after", _pays),
)
LATER = Column("a later token", "decode_ms_per_token", "{:.1f} ms")
PROMPTS = Column("prompts", "batch")
BATCHES = (READER, TOKENS, PROMPTS, READ_AS, TTFT, FASTER, Column("requests/s", "requests_per_s", "{:.2f}"), LATER)
MODEL = (READER, TOKENS, PROMPTS, READ_AS, *columns("{:.1f}x", {"predicted": "predicted", "measured": "ttft_speedup"}))
COMPRESS = (
    Column("method", with_ratio),
    *columns("{:,.0f}", {"passages": "passages", "tokens": "context_tokens", "tokens/s": "tokens_per_s"}),
    Column("of the bare encoder", "bare_share", "{:.2f}"),
    Column(
        "of the reader's layers, no LoRA",
        lambda r: r["plain_ms"] / r["compress_ms"] if "plain_ms" in r else None,
        "{:.2f}",
    ),
)
SELECTION = (
    Column("method", lambda row: method_name(row["method"]) + ", as published" * (row["mode"] == "faithful")),
    Column("passages x tokens", lambda row: f"{row['passages']} x {row['tokens'] // row['passages']:,}"),
    Column("model", "model"),
    Column("took", "seconds", "{:.2f} s"),
    Column("vs. llmlingua", "speedup", "{:.2f}x as fast"),
    Column("over a bare forward", "over_bare", "{:.2f}"),
)
STEP = (
    Column("method", "method"),
    Column("objective", lambda row: OBJECTIVES.get(row["objective"], row["objective"])),
    Column("questions per passage", "questions", "{:.0f}"),
    Column("step / bare", "step_cost", "{:.2f}"),
    milliseconds("step", "step_ms"),
    milliseconds("processor time", "cpu_ms"),
    Column("prompts", "prompts", "{:.0f}"),
    milliseconds("teacher", "teacher_ms"),
    Column("tokens/s", "tokens_per_s", "{:,.0f}"),
    Column("peak memory", "peak_bytes", "{:,.0f} MB", 1e-6),
)
LOSSES = (
    Column("objective", lambda row: str(row["objective"]).upper()),
    *columns("{:,}", {"target tokens": "target_tokens", "vocabulary": "vocabulary"}),
    *columns("{:,.0f} MB", {"measured": "extra_bytes", "bound": "bound_bytes", "without chunks": "whole_bytes"}, 1e-6),
)
STORE = (
    Column("store", "method"),
    Column("passages", lambda row: f"{row['passages']} of {row['slots']:.0f} slots"),
    Column("read", "read_ms", "{:.1f} ms"),
    milliseconds("TTFT", "ttft_memory_ms"),
    Column("adds", "read_share_of_ttft", "{:.1f} %", 100),
    Column("of the copy rate", lambda row: f"{row['read_gbps']:.2f} of {row['copy_gbps']:.2f} GB/s"),
)
