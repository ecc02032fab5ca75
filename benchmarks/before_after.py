"""What changes that profiles led to are worth in time: the earlier way and the present one, taking turns.

`python -m nutgraf.benchmarks.before_after` on a machine that does nothing else; rows of `"test": "before-after"`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..compressors import Reader
from ..compressors.objectives import LanguageModelingLoss
from ..compressors.packing import pack, pass_positions
from ..compressors.scoring import batches as filled
from ..compressors.token_classifier import pad_rows, positions_per_pass
from .clock import Clock
from .loading import find_reader, find_records
from .options import Device, Dtype, ReaderName, friendly_errors
from .rows import RESULTS, Row, append_rows, clean, provenance

Ways = dict[str, Callable[[], object]]
_POSITIONS = 16384  # of a pass, then and now


def batches(reader: Reader, passages: int = 64) -> Ways:
    """The encoder's passes over passages of mixed lengths: sorted and padded under a mask, packed, packed without a mask."""
    texts = list(dict.fromkeys(text for record in find_records("sample") for text in record.passages))
    rows = reader.tokenize_batch(random.Random(0).sample(texts, min(passages, len(texts))))
    lengths = [len(row) for row in rows]
    body: Any = reader.model.get_decoder()

    def run(groups: Sequence[Sequence[int]], masked: bool) -> None:
        for group in groups:
            ids, mask = (part.to(reader.device) for part in pad_rows([rows[i] for i in group], 0))
            body(input_ids=ids, attention_mask=mask if masked else None, use_cache=False)

    full = list(filled(lengths, _POSITIONS, 1.0))
    packed = list(pack(lengths, _POSITIONS, pass_positions(reader.device, gradients=False)))
    return {
        "sorted, masked": lambda: run(full, True),
        "packed, masked": lambda: run(packed, True),
        "packed, no mask": lambda: run(packed, False),
    }


def head(reader: Reader, tokens: int = 4096) -> Ways:
    """The loss of many target tokens, forward and backward: the head run again in the backward pass, and run once."""
    hidden = torch.randn(tokens, reader.width, device=reader.device, dtype=reader.dtype, requires_grad=True)
    ids = torch.randint(reader.vocab_size, (tokens,), device=reader.device)
    loss = LanguageModelingLoss(reader.head, chunk=512)

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(reader.head(rows).float(), wanted, reduction="sum")

    def recomputed() -> None:
        parts = zip(hidden.split(512), ids.split(512))
        total = sum(checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in parts)
        (total / tokens).backward()

    return {"recomputed": recomputed, "once": lambda: loss(hidden, ids).backward()}


def classifier(reader: Reader, tokens: int = 16384) -> Ways:
    """The passes of a token classifier of MiniLM's size over windows of 512 tokens: as many as fit a GPU, or a CPU's caches."""
    from transformers import BertConfig, BertModel

    shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(shape, add_pooling_layer=False).eval().to(reader.device)
    ids = torch.randint(shape.vocab_size, (tokens // 512, 512), device=reader.device)

    def run(positions: int) -> None:
        for some in ids.split(max(1, positions // 512)):
            model(input_ids=some)

    now = positions_per_pass(torch.device("cpu"))
    return {f"{n:,} positions a pass": lambda n=n: run(n) for n in (_POSITIONS, now)}  # type: ignore[misc]


MEASURED = {"batches": batches, "head": head, "classifier": classifier}


def measure(reader: Reader, what: str, repeats: int, warmup: int = 2) -> list[Row]:
    """A row for each way of doing `what`, the earliest first; medians, ways taking turns.

    Raises:
        ValueError: if there is no such change, or repeats are fewer than 1.
    """
    if what not in MEASURED or repeats < 1:
        raise ValueError(f"Changes are {', '.join(MEASURED)}, repeats at least 1; got {what!r} and {repeats}.")
    clock, ways = Clock(reader.device), MEASURED[what](reader)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + repeats):
        for name, run in ways.items():
            with torch.set_grad_enabled(what == "head"):
                spent = clock(run)[0]
            taken[name] += [spent] if turn >= warmup else []
    before = statistics.median(next(iter(taken.values())))
    about = {"suite": "speed", "test": "before-after", "change": what, "threads": torch.get_num_threads(), "n": repeats}
    return [
        clean(about | {"way": name, "ms": ms, "share_of_before": ms / before} | provenance(reader, 0))
        for name, times in taken.items()
        for ms in (statistics.median(times),)
    ]


def main(
    change: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MEASURED)}; default all.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 15,
    reader: ReaderName = "reader-small",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="Results file that rows are appended to.")] = RESULTS / "before_after.jsonl",
) -> None:
    """What changes that profiles led to are worth in time."""
    with friendly_errors():
        loaded = find_reader(reader, device, dtype)
        for what in change or MEASURED:
            rows = measure(loaded, what, repeats)
            append_rows(out, rows)
            for row in rows:
                typer.echo(f"{what:12} {row['way']:26} {row['ms']:8.1f} ms  {100 * row['share_of_before']:5.0f} %")


if __name__ == "__main__":
    typer.run(main)
