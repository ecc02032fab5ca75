"""How fast stored passages are read: `python -m nutgraf.benchmarks.speed.store --out benchmarks/results/store.jsonl`.

Slabs next to the table, also encrypted, slots within the table, and memory, next to a plain copy. All stores read the same
batches, drawn for each repeat, in turns; the fastest repeat counts. Reading ends with the slots of all passages in one tensor,
so that the pages of a mapped file are really touched. `read_cpu_ms` is the median processor time of a batch, and
`decrypt_cpu_ms` that of AES-GCM alone, on as many bytes. `first` rows read from a store that was just opened (files in the page
cache), the others are `warm`. With `--reader` rows have the state `answer`: what reading adds to the time to first token of a
prompt.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...adapters.store import Entry, LanceStore, MemoryStore, PassageKey, PassageStore
from ...compressors import CompressedPassage, Reader
from ..loading import find_reader
from ..rows import Row, append_rows, command, commit, device_name
from .clock import timed
from .entrants import make_passages, make_tail, random_slots

CPU = torch.device("cpu")
STORES: dict[str, Callable[[Path], PassageStore]] = {
    "memory": lambda folder: MemoryStore(),
    "slabs": lambda folder: LanceStore(folder, layout="slabs"),
    "slabs-encrypted": lambda folder: LanceStore(folder, layout="slabs", keys=b"k" * 32),
    "slabs-int8": lambda folder: LanceStore(folder, layout="slabs", quantize="int8"),
    "slabs-int4": lambda folder: LanceStore(folder, layout="slabs", quantize="int4"),
    "table": lambda folder: LanceStore(folder, layout="table"),
}


def entries(number: int, slots: int, width: int) -> list[Entry]:
    """Random passages of float16 embeddings."""
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


def decryption(number: int, nbytes: int) -> Callable[[Sequence[int]], None]:
    """What the cryptography package alone does to open records of some bytes: as many as a store has, one buffer for all."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    box, nonce, out = AESGCM(b"k" * 32), bytes(12), bytearray(nbytes)
    records = [box.encrypt(nonce, random.randbytes(nbytes), None) for _ in range(number)]

    def decrypt(places: Sequence[int]) -> None:
        for i in places:
            box.decrypt_into(nonce, records[i], None, out)

    return decrypt


def store_rows(number: int, batch: int, slots: int, width: int, repeats: int, folder: Path) -> list[Row]:
    """Milliseconds and GB/s of each store, warm and just opened, next to a copy in memory."""
    made = entries(number, slots, width)
    keys = [entry.key for entry in made]
    stores = {name: make(folder / name) for name, make in STORES.items()}
    write: dict[str, float] = {}
    for name, store in stores.items():
        start = time.perf_counter()
        for first in range(0, number, 64):
            store.put_many(made[first : first + 64])
        write[name] = time.perf_counter() - start
        read(store, keys)
    decrypt = decryption(number, slots * width * 2)
    copied: list[float] = []
    decrypted: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in stores}  # processor time, warm
    taken: dict[str, dict[str, list[float]]] = {
        "warm": {name: [] for name in stores},
        "first": {name: [] for name in stores if name != "memory"},
    }
    for _ in range(repeats):
        places = torch.randperm(number)[:batch].tolist()
        drawn = [keys[i] for i in places]
        copied.append(timed(CPU, partial(torch.cat, [made[i].passage.embeds for i in places])))
        decrypted.append(_processor(partial(decrypt, places)))
        for name, store in stores.items():
            taken["warm"][name].append(timed(CPU, partial(read, store, drawn)))
            spent[name].append(_processor(partial(read, store, drawn)))
        for name, times in taken["first"].items():
            opened = STORES[name](folder / name)
            times.append(timed(CPU, partial(read, opened, drawn)))
            opened.close()
    nbytes = batch * slots * width * 2  # as they are read, in float16
    return [
        {
            "method": name,
            "state": state,
            **_rates(nbytes, min(times), min(copied)),
            **({"read_cpu_ms": statistics.median(spent[name])} if state == "warm" else {}),
            **({"decrypt_cpu_ms": statistics.median(decrypted)} if name == "slabs-encrypted" else {}),
            "write_passages_per_s": number / write[name],
            "bytes_per_passage": stores[name].stats.nbytes / number,
        }
        for state, all_times in taken.items()
        for name, times in all_times.items()
    ]


def _processor(call: Callable[[], Any]) -> float:
    """Milliseconds of processor time, which other processes do not lengthen."""
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def _rates(nbytes: int, read_ms: float, copy_ms: float) -> Row:
    read, copy = nbytes / read_ms / 1e6, nbytes / copy_ms / 1e6
    return {"read_ms": read_ms, "read_gbps": read, "copy_gbps": copy, "share": read / copy}


def answer_rows(
    reader: Reader,
    stores: Mapping[str, Callable[[Path], PassageStore]],
    passages: int,
    passage_tokens: int,
    ratio: float,
    repeats: int,
    folder: Path,
) -> list[Row]:
    """What warm reads from each store add to the time to first token; medians of turns.

    Passages have slots of random values in the reader's dtype. `ttft_memory_ms` is the first token of a prompt with its
    passages in memory, `read_ms` is reading them onto the reader's device, `copy_gbps` a plain copy of the same slots.

    Raises:
        ValueError: If the prompt does not fit into the reader.
    """
    texts, tail = make_passages(reader, passages, passage_tokens), make_tail(reader)
    made = random_slots(reader, texts, ratio, "embeds")
    keys = [PassageKey.of(text, compressor=p.compressor, reader=p.reader) for text, p in zip(texts, made)]
    opened = {name: make(folder / name) for name, make in stores.items()}
    for store in opened.values():
        store.put_many([Entry(key, p, text) for key, p, text in zip(keys, made, texts)])
    tensors = [p.embeds for p in made if p.embeds is not None]
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    calls: dict[str, Callable[[], Any]] = {
        "answer": lambda: reader.generate([[*made, tail]], 1, min_new_tokens=1),
        "copy": lambda: torch.cat(tensors),
        **{name: partial(_read_onto, store, keys, reader) for name, store in opened.items()},
    }
    rounds = [{name: timed(reader.device, call) for name, call in calls.items()} for _ in range(repeats + 2)][2:]
    whole = statistics.median(times["answer"] for times in rounds)
    copied = min(times["copy"] for times in rounds)
    return [
        {
            "method": name,
            "state": "answer",
            "reader_shape": reader.name,
            "slots": sum(len(t) for t in tensors) / passages,
            "ratio_asked": ratio,
            "context_tokens": sum(p.source_tokens for p in made),
            "n": repeats,
            **_rates(nbytes, spent := statistics.median(times[name] for times in rounds), copied),
            "ttft_memory_ms": whole,
            "read_share_of_ttft": spent / whole,
            "bytes_per_passage": store.stats.nbytes / passages,
            "threads": torch.get_num_threads(),
        }
        for name, store in opened.items()
    ]


def _read_onto(store: PassageStore, keys: list[PassageKey], reader: Reader) -> list[Any]:
    found = store.get_many(keys)
    if any(p is None for p in found):
        raise RuntimeError("The store lost a passage that was put into it.")
    return [p.to(reader.device) for p in found if p is not None]


def main(
    passages: Annotated[int, typer.Option(help="Passages in the store.")] = 2048,
    batch: Annotated[int, typer.Option(help="Passages read at a time.")] = 64,
    slots: Annotated[int, typer.Option(help="Slots of a passage.")] = 16,
    width: Annotated[int, typer.Option(help="Embedding width.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Batches read.")] = 20,
    reader: Annotated[
        str | None, typer.Option(help="Measure instead what reading adds to this reader's time to first token.")
    ] = None,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of a passage, with --reader.")] = 200,
    ratio: Annotated[float, typer.Option(help="Tokens per slot, with --reader.")] = 16.0,
    folder: Annotated[Path | None, typer.Option(help="Folder for the stores; default: a temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results file to append rows to.")] = None,
) -> None:
    """Read stored passages in several layouts; compare with a copy in memory, or with the time to first token."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if reader is not None:
            loaded = find_reader(reader, "cpu", "auto")
            found = answer_rows(loaded, STORES, batch, passage_tokens, ratio, repeats, Path(place))
            passages, slots, width = batch, round(found[0]["slots"]), loaded.width
        else:
            found = store_rows(passages, batch, slots, width, repeats, Path(place))
    about: Row = {
        "suite": "store",
        "command": f"python -m nutgraf.benchmarks.speed.{command()}",
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
    rows = [about | row for row in found]
    for row in rows:
        adds = (
            f"adds {100 * row['read_share_of_ttft']:.1f} % to TTFT"
            if reader
            else f"{row['bytes_per_passage']:,.0f} bytes"
        )
        typer.echo(
            f"{row['method']:12} {row['state']:6} {row['read_ms']:9.2f} ms  {row['read_gbps']:7.3f} GB/s, "
            f"{100 * row['share']:5.1f} % of a copy ({row['copy_gbps']:.2f} GB/s)  {adds}"
        )
    if out is not None:
        append_rows(out, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
