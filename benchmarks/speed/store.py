"""How fast stored passages are read: slabs beside the table against slots in the table, beside a plain copy of memory.

Run it as ``python -m nutgraf.benchmarks.speed.store --out benchmarks/results/store.jsonl``. Every method reads the same batches
of passages, drawn anew for each repeat; methods take turns, and the fastest repeat counts, which other work on the machine
disturbed least. Reading ends with the slots of all passages copied into one tensor, as a prompt needs them, so that the
pages of a mapped file are really touched. ``first`` rows read from a store that was just opened (files are in the page
cache); the others are warm. ``copy_gbps`` is the same copy from tensors in memory, and ``share`` is the part of its rate
that reading keeps. With ``--reader reader-small`` rows are of state ``answer``: what reading the passages of one prompt adds to
the time to the first token from passages that are in memory.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...adapters.store import Entry, LanceStore, MemoryStore, PassageKey, PassageStore
from ...compressors import CompressedPassage
from ..loading import find_reader
from ..rows import append_rows, command, commit, device_name
from .store_answers import first_token_rows

STORES: dict[str, Callable[[Path], PassageStore]] = {
    "memory": lambda folder: MemoryStore(),
    "slabs": lambda folder: LanceStore(folder, layout="slabs"),
    "slabs-int8": lambda folder: LanceStore(folder, layout="slabs", quantize="int8"),
    "slabs-int4": lambda folder: LanceStore(folder, layout="slabs", quantize="int4"),
    "table": lambda folder: LanceStore(folder, layout="table"),
}


def entries(number: int, slots: int, width: int) -> list[Entry]:
    """Made-up passages of float16 embeddings."""
    out = []
    for i in range(number):
        embeds = torch.randn(slots, width, generator=torch.Generator().manual_seed(i)).to(torch.float16)
        passage = CompressedPassage("embeds", 8 * slots, "compressor", "reader", embeds=embeds)
        text = f"{i} " * 100
        out.append(Entry(PassageKey.of(text, compressor="compressor", reader="reader"), passage, text))
    return out


def read(store: PassageStore, keys: Sequence[PassageKey]) -> torch.Tensor:
    """The slots of passages in one tensor."""
    return torch.cat([passage.embeds for passage in store.get_many(keys) if passage is not None])  # type: ignore[misc]


def measure(number: int, batch: int, slots: int, width: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds and gigabytes a second of each store, warm and just opened, beside a copy in memory."""
    made = entries(number, slots, width)
    keys = [entry.key for entry in made]
    stores = {name: make(folder / name) for name, make in STORES.items()}
    write: dict[str, float] = {}
    for name, store in stores.items():
        start = time.perf_counter()
        for first in range(0, number, 64):
            store.put_many(made[first : first + 64])
        write[name] = time.perf_counter() - start
    copied: list[float] = []
    warm: dict[str, list[float]] = {name: [] for name in stores}
    cold: dict[str, list[float]] = {name: [] for name in stores if name != "memory"}
    for store in stores.values():
        read(store, keys)
    for _ in range(repeats):
        drawn = [keys[i] for i in torch.randperm(number)[:batch].tolist()]
        tensors = [made[keys.index(key)].passage.embeds for key in drawn]
        copied.append(_time(lambda tensors=tensors: torch.cat(tensors)))  # type: ignore[misc]
        for name, store in stores.items():
            warm[name].append(_time(lambda store=store, drawn=drawn: read(store, drawn)))  # type: ignore[misc]
        for name in cold:
            opened = LanceStore(folder / name)
            cold[name].append(_time(lambda opened=opened, drawn=drawn: read(opened, drawn)))  # type: ignore[misc]
            opened.close()
    size = batch * slots * width * 2  # of the slots as they are read, in float16
    rate = size / min(copied) / 1e9
    rows = []
    for state, times in (("warm", warm), ("first", cold)):
        for name, taken in times.items():
            seconds = min(taken)
            rows.append(
                {
                    "method": name,
                    "state": state,
                    "read_ms": seconds * 1e3,
                    "read_gbps": size / seconds / 1e9,
                    "copy_gbps": rate,
                    "share": size / seconds / 1e9 / rate,
                    "write_passages_per_s": number / write[name],
                    "bytes_per_passage": stores[name].stats.nbytes / number,
                }
            )
    return rows


def main(
    passages: Annotated[int, typer.Option(help="Passages in the store.")] = 2048,
    batch: Annotated[int, typer.Option(help="Passages read at a time.")] = 64,
    slots: Annotated[int, typer.Option(help="Slots of a passage.")] = 16,
    width: Annotated[int, typer.Option(help="Embedding width.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Batches read.")] = 20,
    reader: Annotated[
        str | None, typer.Option(help="Measure instead what reading adds to this reader's time to the first token.")
    ] = None,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of a passage, with --reader.")] = 200,
    ratio: Annotated[float, typer.Option(help="Tokens of a slot, with --reader.")] = 16.0,
    folder: Annotated[Path | None, typer.Option(help="Where the stores are made; default: a temporary folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file that rows are appended to.")] = None,
) -> None:
    """Read stored passages in several layouts, and compare with a copy of memory or with the answer that waits for them."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        if reader is not None:
            loaded = find_reader(reader, "cpu", "auto")
            found = first_token_rows(loaded, STORES, batch, passage_tokens, ratio, repeats, place)
            passages, slots, width = batch, round(found[0]["slots"]), loaded.width
        else:
            found = measure(passages, batch, slots, width, repeats, place)
    finally:
        shutil.rmtree(place)
    about = {
        "suite": "store",
        "command": f"python -m nutgraf.benchmarks.{command()}",
        "commit": commit(),
        "device": device_name("cpu"),
        "dtype": "float16" if reader is None else "float32",
        "seed": torch.initial_seed(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "passages": passages,
        "batch": batch,
        "slots": slots,
        "width": width,
    }
    rows: list[dict[str, Any]] = [about | row for row in found]
    for row in rows:
        if reader is not None:
            typer.echo(
                f"{row['method']:12} read {row['read_ms']:7.2f} ms  TTFT {row['ttft_memory_ms']:8.1f} ms from memory  "
                f"adds {100 * row['read_share_of_ttft']:5.1f} %  {row['read_gbps']:7.3f} GB/s beside {row['copy_gbps']:.2f}"
            )
            continue
        typer.echo(
            f"{row['method']:12} {row['state']:6} {row['read_ms']:9.2f} ms  {row['read_gbps']:7.3f} GB/s  "
            f"{100 * row['share']:5.1f} % of a copy ({row['copy_gbps']:.2f} GB/s)  {row['bytes_per_passage']:,.0f} bytes"
        )
    if out is not None:
        append_rows(out, rows)


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
