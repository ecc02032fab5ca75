"""The speed suite: time to the first token against the length of the context, full text beside compressed passages."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import question_prompt
from .. import metrics
from ..costs.costs import Work, decoder_shape
from ..costs.roofline import Roofline
from ..progress import progress_bar
from ..rows import Row, clean, provenance
from .timing import Contender, Cost, Request, time_contenders

FULL = Contender("full")


def speed(
    reader: Reader,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    *,
    passages: Sequence[int] = (1, 2, 4, 6, 8, 10),
    requests: int = 3,
    repeats: int = 5,
    decode_tokens: int = 16,
    dataset: str = "",
    seed: int = 0,
    progress: bool = True,
    roofline: Roofline | None = None,
) -> list[Row]:
    """A row for the full text and for every contender at each number of passages.

    Passages come from the records' own pool, the same ones for every contender. Numbers of passages whose full text the
    reader has no room for are left out.

    Args:
        roofline: the device's rates; then rows say how near to them the prefill is, if the reader's cost can be counted.

    Raises:
        ValueError: if the records hold too few passages, or the reader has room for none of the sizes.
    """
    everyone = [FULL, *contenders]
    rows: list[Row] = []
    for count in passages:
        asked = make_requests(records, count, requests)
        longest = max(reader.length(question_prompt(r.passages, r.question)) for r in asked)
        if reader.max_positions is not None and longest + decode_tokens > reader.max_positions:
            continue
        with progress_bar(progress) as bar:
            task = bar.add_task(
                f"times, {count} passage{'s' * (count > 1)}", total=(repeats + 2) * len(asked) * len(everyone)
            )
            costs = time_contenders(
                reader,
                everyone,
                asked,
                repeats=repeats,
                decode_tokens=decode_tokens,
                advance=functools.partial(bar.advance, task),
            )
        for contender, cost in zip(everyone, costs):
            row = cost_row(contender, cost, costs[0], count, decode_tokens) | {
                "dataset": dataset,
                "n": len(asked) * repeats,
            }
            row |= {"reader_shape": shape(reader)} | provenance(reader, seed, contender.compressor)
            if roofline is not None and (work := prefill_work(reader, cost, roofline.dtype)) is not None:
                floor = 1000 * roofline.seconds(work)
                row |= {"roofline_ms": floor, "roofline_share": floor / cost.ttft}
            rows.append(clean(row))
    if not rows:
        raise ValueError(
            f"The full text of {min(passages)} passages takes more than {reader.max_positions} positions; ask for fewer."
        )
    return rows


def make_requests(records: Sequence[Record], passages: int, count: int) -> list[Request]:
    """`count` requests of `passages` different passages each, drawn one after another from all that the records hold."""
    pool = list(dict.fromkeys(text for record in records for text in record.passages))
    if passages < 1 or passages > len(pool):
        raise ValueError(f"A request needs 1 to {len(pool)} passages, as many as the records hold; got {passages}.")
    return [
        Request(
            records[k % len(records)].question, tuple(pool[(k * passages + i) % len(pool)] for i in range(passages))
        )
        for k in range(count)
    ]


def cost_row(contender: Contender, cost: Cost, full: Cost, passages: int, decode_tokens: int) -> Row:
    """The figures of a results row. `ttft_ms` is with stored passages, `ttft_online_ms` with compression on the way.

    `requests_per_s` is one request after another, each answered in `decode_tokens` tokens.
    `break_even_reads` is how many reads of a stored request pay for compressing it once: compress / (full - stored TTFT);
    absent when the stored request is not faster.
    """
    saved = full.ttft - cost.ttft
    row: Row = {
        "suite": "speed",
        "method": contender.name,
        "ratio_asked": contender.ratio,
        "ratio": metrics.compression_ratio(round(cost.context_tokens), round(cost.slots)),
        "passages": passages,
        "batch": 1,
        "context_tokens": cost.context_tokens,
        "reader_tokens": cost.reader_tokens,
        "plan_ms": cost.plan,
        "prefill_ms": cost.prefill,
        "ttft_ms": cost.ttft,
        "decode_ms_per_token": cost.decode,
        "ttft_full_ms": full.ttft,
        "ttft_speedup": full.ttft / cost.ttft,
        "bytes_per_passage": cost.bytes_per_passage,
        "flops": cost.flops,
        "peak_bytes": cost.peak_bytes,
        "requests_per_s": 1000 / (cost.ttft + cost.decode * (decode_tokens - 1)),
        "decode_tokens": decode_tokens,
    }
    if contender.compressor is not None:
        row |= {
            "compress_ms": cost.compress,
            "load_ms": cost.load,
            "ttft_online_ms": cost.ttft_online,
            "ttft_online_speedup": full.ttft / cost.ttft_online,
            "break_even_reads": cost.compress / saved if saved > 0 else None,
        }
    return row


def prefill_work(reader: Reader, cost: Cost, dtype: str) -> Work | None:
    """The least that one prefill takes, counted from the reader's config; None for an architecture that is not known."""
    try:
        counted = decoder_shape(reader.model.config)
    except ValueError:
        return None
    past = round(cost.kv_slots)
    return counted.forward(round(cost.reader_tokens) - past, past, dtype=dtype)


def shape(reader: Reader) -> str:
    """The reader's architecture and size, as `LlamaForCausalLM 5x256, 8.1M`."""
    config = reader.model.config.get_text_config()
    millions = sum(p.numel() for p in reader.model.parameters()) / 1e6
    return f"{type(reader.model).__name__} {config.num_hidden_layers}x{config.hidden_size}, {millions:.1f}M"
