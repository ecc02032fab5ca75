"""The tables of speed and cost, from results rows: the same for the README and for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..names import method_name
from ..rows import Row

FULL, RANDOM = "full", "random-slots"
SAME = ("reader", "device", "dtype", "threads")  # rows that differ here were not measured alike
ACCOUNT = ("reader_shape", "context_asked", "passages", "batch", "method", "interface", "ratio_asked")


@dataclass(frozen=True)
class SpeedTable:
    """A table: its title, one sentence on how to read it, the names of the columns and the lines."""

    title: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def speed_tables(rows: Iterable[Row]) -> list[SpeedTable]:
    """All tables that some row belongs in, from the newest row of each line."""
    rows = list(rows)
    makers: list[Callable[[list[Row]], SpeedTable | None]] = [
        first_token, batches, compressing, selecting, training, loss_memory, store,
    ]  # fmt: skip
    return [table for make in makers if (table := make(rows)) is not None]


def missing(rows: Iterable[Row]) -> list[str]:
    """What the targets name and no row has measured yet, in sentences."""
    account = [row for row in rows if row.get("test") == "account"]
    seen = {(row["reader_shape"], not str(row["device"]).startswith("cpu")) for row in account}
    out = []
    if gpu := [shape for shape in ("llama-1b", "llama-3b", "llama-8b") if (shape, True) not in seen]:
        out.append(
            f"On a GPU: readers of the shapes {', '.join(gpu)} at 2k to 32k tokens, beside their rooflines, in batches, and "
            "the methods on them."
        )
    if ("llama-1b", False) not in seen:
        out.append("On the CPU: a reader of the 1B shape.")
    return out


def first_token(rows: Sequence[Row]) -> SpeedTable | None:
    """Time to the first token of one prompt, by context and ratio."""
    found = _newest(
        rows, "account", ("reader_shape", "context_asked", "passages", "batch", "method", "interface", "ratio_asked")
    )
    found = _in_order([row for row in found if row["batch"] == 1])
    lines = [
        (
            _reader(row),
            f"{row['context_tokens']:,.0f} in {row['passages']}",
            _read_as(row),
            f"{row['reader_tokens']:,.0f}",
            _ms(row["ttft_ms"]),
            "" if row["method"] == FULL else f"{row['ttft_speedup']:.1f}x",
            f"{100 * row['roofline_share']:.0f} %",
            "" if row["method"] == FULL else _reads(row),
        )
        for row in found
    ]
    return _table(
        "Time to the first token",
        "Passages compressed ahead of time and loaded from disk; beside them 64 tokens of question and template. Of the "
        "roofline: the least time that the device's own rates allow, over the time taken.",
        (
            "reader",
            "tokens, passages",
            "read as",
            "positions",
            "TTFT",
            "faster",
            "of the roofline",
            "compressing pays after",
        ),
        lines,
    )


def batches(rows: Sequence[Row]) -> SpeedTable | None:
    """Several prompts at a time."""
    found = _newest(
        rows, "account", ("reader_shape", "context_asked", "passages", "batch", "method", "interface", "ratio_asked")
    )
    cases = {_case(row) for row in found if row["batch"] > 1}
    found = _in_order([row for row in found if _case(row) in cases])
    lines = [
        (
            _reader(row),
            f"{row['context_tokens']:,.0f}",
            f"{row['batch']}",
            _read_as(row),
            _ms(row["ttft_ms"]),
            "" if row["method"] == FULL else f"{row['ttft_speedup']:.1f}x",
            f"{row['requests_per_s']:.2f}",
            f"{row['decode_ms_per_token']:.1f} ms",
        )
        for row in found
    ]
    return _table(
        "Several prompts at a time",
        "TTFT is of the whole batch; requests are answered in as many tokens as the rows say (`decode_tokens`).",
        ("reader", "tokens", "prompts", "read as", "TTFT", "faster", "requests/s", "a later token"),
        lines,
    )


def compressing(rows: Sequence[Row]) -> SpeedTable | None:
    """Compress throughput beside the bare encoder."""
    found = _newest(rows, "compress", ("reader_shape", "method", "ratio_asked", "passages"))
    lines = [
        (
            _named(row),
            f"{row['passages']}",
            f"{row['context_tokens']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['bare_share']:.2f}",
            f"{row['plain_ms'] / row['compress_ms']:.2f}" if "plain_ms" in row else "",
        )
        for row in found
    ]
    return _table(
        "Compressing passages of mixed lengths",
        "Share of the throughput of a bare forward pass of the encoder's layers over the same tokens and slots, and of the "
        "reader's layers without LoRA.",
        ("method", "passages", "tokens", "tokens/s", "of the bare encoder", "of the reader's layers"),
        lines,
    )


def selecting(rows: Sequence[Row]) -> SpeedTable | None:
    """Token selection beside the package it comes from."""
    about = ("method", "mode", "model", "tokens", "passages")
    rows = [row | {"reader_shape": row.get("model")} for row in rows if row.get("suite") == "selection"]
    lines = [
        (
            f"{method_name(row['method'])}{', as published' if row['mode'] == 'faithful' else ''}",
            f"{row['passages']} x {row['tokens'] // row['passages']:,}",
            row["model"],
            f"{row['seconds']:.2f} s",
            f"{row['speedup']:.2f}x as fast",
            f"{row['over_bare']:.2f}",
        )
        for row in _newest(rows, "speed", about, "selection")
    ]
    return _table(
        "Selecting tokens",
        "To the same kept share as llmlingua 0.2.2, with the same weights, text and threads, taking turns; and over one bare "
        "forward pass of the model. As published, both forward the same positions.",
        ("method", "passages x tokens", "model", "took", "beside llmlingua", "over a bare forward"),
        lines,
    )


def training(rows: Sequence[Row]) -> SpeedTable | None:
    """A training step over its bare passes."""
    found = _newest(rows, "step", ("reader_shape", "method", "objective", "batch"), suite="training")
    names = {"ae": "AE", "lm": "LM", "kl": "KL, teacher beside it", "kl-cached": "KL, teacher's logits from disk"}
    lines = [
        (
            str(row["method"]),
            str(names.get(row["objective"], row["objective"])),
            f"{row['step_cost']:.2f}",
            _ms(row["step_ms"]),
            _ms(row["teacher_ms"]) if "teacher_ms" in row else "",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in row else "",
        )
        for row in found
    ]
    return _table(
        "A training step",
        "Over a bare forward and backward pass of the same tokens, without padding, data or optimiser; the teacher counts "
        "apart.",
        ("method", "objective", "step / bare", "step", "teacher", "tokens/s", "peak memory"),
        lines,
    )


def loss_memory(rows: Sequence[Row]) -> SpeedTable | None:
    """Memory of the losses at a large vocabulary."""
    found = _newest(rows, "loss-memory", ("objective", "target_tokens_asked", "vocabulary"), suite="training")
    lines = [
        (
            str(row["objective"]).upper(),
            f"{row['target_tokens']:,}",
            f"{row['vocabulary']:,}",
            f"{row['extra_bytes'] / 1e6:,.0f} MB",
            f"{row['bound_bytes'] / 1e6:,.0f} MB",
            f"{row['whole_bytes'] / 1e6:,.0f} MB",
        )
        for row in found
        if "extra_bytes" in row
    ]
    return _table(
        "Memory of the losses",
        "Extra memory, forward and backward, beside the bound that the chunk sets and what all logits at once would take.",
        ("objective", "target tokens", "vocabulary", "measured", "bound", "without chunks"),
        lines,
    )


def store(rows: Sequence[Row]) -> SpeedTable | None:
    """What reading from a store adds to the first token."""
    rows = [row for row in rows if row.get("suite") == "store" and row.get("state") == "answer"]
    found = list(
        {tuple(row.get(key) for key in (*SAME, "reader_shape", "method", "passages")): row for row in rows}.values()
    )
    lines = [
        (
            str(row["method"]),
            f"{row['passages']} of {row['slots']:.0f} slots",
            f"{row['read_ms']:.1f} ms",
            _ms(row["ttft_memory_ms"]),
            f"{100 * row['read_share_of_ttft']:.1f} %",
            f"{row['read_gbps']:.2f} of {row['copy_gbps']:.2f} GB/s",
        )
        for row in found
    ]
    return _table(
        "Reading from the store",
        "Warm, beside the time to the first token from passages that are in memory, and beside a plain copy.",
        ("store", "passages", "read", "TTFT", "adds", "of the copy rate"),
        lines,
    )


# -- parts -----------------------------------------------------------------------------------------------------------


def _newest(rows: Sequence[Row], test: str, about: tuple[str, ...], suite: str = "speed") -> list[Row]:
    chosen = [row for row in rows if row.get("suite") == suite and row.get("test") == test]
    readers = {
        row.get("reader_shape"): row.get("reader") for row in chosen
    }  # a reader that was retrained replaces itself
    chosen = [row for row in chosen if row.get("reader") == readers[row.get("reader_shape")]]
    keys = tuple(key for key in SAME if key != "reader")
    return list({tuple(row.get(key) for key in (*keys, *about)): row for row in chosen}.values())


def _in_order(rows: Sequence[Row]) -> list[Row]:
    def place(row: Row) -> tuple[object, ...]:
        kind = (row["method"] != FULL, row["method"] == RANDOM, row["method"], row.get("ratio_asked") or 0)
        return (str(row["device"]), row["reader_shape"], row["context_asked"], row["passages"], row["batch"], *kind)

    return sorted(rows, key=place)


def _case(row: Row) -> tuple[object, ...]:
    return (row["reader_shape"], row["device"], row["context_asked"], row["passages"])


def _reader(row: Row) -> str:
    threads = f", {row['threads']} threads" if "threads" in row else ""
    device = "CPU" if str(row["device"]).startswith("cpu") else str(row["device"])
    return f"{row['reader_shape']}, {device}{threads}"


def _read_as(row: Row) -> str:
    if row["method"] == FULL:
        return "full text"
    name = "slots" if row["method"] == RANDOM else str(row["method"])
    kind = ", keys and values" if row["interface"] == "kv" else ""
    return (
        f"{row['slots']:,} {name}{kind} ({row['ratio']:.0f}x)"
        if name == "slots"
        else (f"{row['slots']:,} slots of {name}{kind} ({row['ratio']:.0f}x)")
    )


def _named(row: Row) -> str:
    ratio = f" {row['ratio_asked']:g}x" if "ratio_asked" in row else ""
    return f"{row['method']}{ratio}"


def _reads(row: Row) -> str:
    return f"{row['break_even_reads']:,.1f} reads" if "break_even_reads" in row else "never"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 20 else f"{value:.1f} ms"


def _table(title: str, caption: str, columns: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> SpeedTable | None:
    return SpeedTable(title, caption, columns, tuple(lines)) if lines else None
