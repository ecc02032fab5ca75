"""Speed over a file's passages: time to first token against context length, full text and compressed passages."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Sequence

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import question_prompt
from ..costs.costs import decoder_shape
from ..costs.roofline import Roofline
from ..progress import progress_bar
from ..rows import Row, clean, provenance
from .entrants import FULL, Entrant
from .timing import Request, Taken, figures, time_requests


def speed(
    reader: Reader,
    entrants: Sequence[Entrant],
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
    """A row for the full text and for every entrant at each number of passages, all reading the same passages.

    Numbers of passages for which the full text does not fit into the reader are left out.

    Args:
        requests: Different requests at each number of passages.
        roofline: The device's rates; rows then say how close the prefill comes to them, if the reader's cost is known.

    Raises:
        ValueError: If the records hold too few passages, or no number of passages fits.
    """
    everyone = [FULL, *entrants]
    counted = None
    with contextlib.suppress(ValueError):  # an architecture whose cost is unknown
        counted = decoder_shape(reader.model.config)
    rows: list[Row] = []
    for count in passages:
        asked = make_requests(records, count, requests)
        longest = max(reader.length(question_prompt(r.passages, r.question)) for r in asked)
        if reader.max_positions is not None and longest + decode_tokens > reader.max_positions:
            continue
        with progress_bar(progress) as bar:
            title, total = f"times, {count} passage{'s' * (count > 1)}", (repeats + 2) * len(asked) * len(everyone)
            advance = functools.partial(bar.advance, bar.add_task(title, total=total))
            taken = time_requests(
                reader, everyone, asked, repeats=repeats, decode_tokens=decode_tokens, advance=advance
            )
        for entrant, own in taken.items():
            row = _row(entrant, own, taken[FULL], decode_tokens) | provenance(reader, seed, entrant.compressor)
            row |= {"passages": count, "dataset": dataset, "n": len(asked) * repeats, "reader_shape": shape(reader)}
            if roofline is not None and counted is not None:
                floor = 1000 * roofline.seconds(own.prefill(counted, roofline.dtype))
                row |= {"roofline_ms": floor, "roofline_share": floor / row["ttft_ms"]}
            rows.append(clean(row))
    if not rows:
        raise ValueError(
            f"The full text of {min(passages)} passages takes more than {reader.max_positions} positions; ask for fewer."
        )
    return rows


def _row(entrant: Entrant, taken: Taken, full: Taken, decode_tokens: int) -> Row:
    """`ttft_ms` is with stored passages, `ttft_online_ms` with compression within the request."""
    row: Row = {"suite": "speed", "method": entrant.method, "ratio_asked": entrant.ratio, "batch": 1}
    row |= figures(entrant, taken, full, 1, decode_tokens) | {"flops": taken.flops, "decode_tokens": decode_tokens}
    if taken.online:
        online = statistics.median(taken.online)
        row |= {"ttft_online_ms": online, "ttft_online_speedup": full.median("ttft") / online}
    return row


def make_requests(records: Sequence[Record], passages: int, count: int) -> list[Request]:
    """`count` requests of `passages` different passages each, drawn in turn from all passages of the records."""
    pool = list(dict.fromkeys(text for record in records for text in record.passages))
    if passages < 1 or passages > len(pool):
        raise ValueError(f"A request needs 1 to {len(pool)} passages, as many as the records hold; got {passages}.")
    chosen = [tuple(pool[(k * passages + i) % len(pool)] for i in range(passages)) for k in range(count)]
    return [Request(records[k % len(records)].question, texts) for k, texts in enumerate(chosen)]


def shape(reader: Reader) -> str:
    """The reader's architecture and size, such as `LlamaForCausalLM 5x256, 8.1M`."""
    config = reader.model.config.get_text_config()
    millions = sum(p.numel() for p in reader.model.parameters()) / 1e6
    return f"{type(reader.model).__name__} {config.num_hidden_layers}x{config.hidden_size}, {millions:.1f}M"
