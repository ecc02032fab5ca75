"""What reading passages from a store adds to the time to the first token of the prompt that they stand in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapters.store import Entry, PassageKey, PassageStore
from ...compressors import Reader
from ..rows import Row
from .entrants import make_passages, make_tail, random_passage, slots_of


def first_token_rows(
    reader: Reader,
    stores: Mapping[str, Callable[[Path], PassageStore]],
    passages: int,
    passage_tokens: int,
    ratio: float,
    repeats: int,
    folder: Path,
) -> list[Row]:
    """Rows of state `answer`, one a store; stores take turns, and medians count.

    Passages have slots of random values in the reader's dtype. `ttft_memory_ms` is the first token of a prompt whose passages
    are in memory, `read_ms` is reading them from the store (warm) onto the reader's device, and `read_share_of_ttft` their
    ratio. `copy_gbps` is a plain copy of the same slots in memory.

    Raises:
        ValueError: if the prompt has no room in the reader.
    """
    texts, tail = make_passages(reader, passages, passage_tokens), make_tail(reader)
    lengths = [len(ids) for ids in reader.tokenize_batch(texts)]
    generator = torch.Generator(device=reader.device).manual_seed(0)
    made = [random_passage(reader, n, slots_of(n, ratio), "embeds", generator) for n in lengths]
    keys = [PassageKey.of(text, compressor=p.compressor, reader=p.reader) for text, p in zip(texts, made)]
    opened = {name: make(folder / name) for name, make in stores.items()}
    for store in opened.values():
        store.put_many([Entry(key, p, text) for key, p, text in zip(keys, made, texts)])
    tensors = [p.embeds for p in made if p.embeds is not None]
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    ttft: list[float] = []
    copied: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(repeats + 2):
        spent = _milliseconds(lambda: reader.generate([[*made, tail]], 1, min_new_tokens=1))
        copy = _milliseconds(lambda: torch.cat(tensors))
        reads = {name: _milliseconds(partial(_read, store, keys, reader)) for name, store in opened.items()}
        if turn >= 2:
            ttft.append(spent)
            copied.append(copy)
            for name, one in reads.items():
                taken[name].append(one)
    whole, rate = statistics.median(ttft), nbytes / min(copied) / 1e6
    return [
        {
            "method": name,
            "state": "answer",
            "reader_shape": reader.name,
            "slots": sum(len(t) for t in tensors) / passages,
            "ratio_asked": ratio,
            "context_tokens": sum(lengths),
            "n": repeats,
            "read_ms": (read := statistics.median(times)),
            "ttft_memory_ms": whole,
            "read_share_of_ttft": read / whole,
            "read_gbps": nbytes / read / 1e6,
            "copy_gbps": rate,
            "share": nbytes / read / 1e6 / rate,
            "bytes_per_passage": opened[name].stats.nbytes / passages,
            "threads": torch.get_num_threads(),
        }
        for name, times in taken.items()
    ]


def _read(store: PassageStore, keys: list[PassageKey], reader: Reader) -> list[Any]:
    found = store.get_many(keys)
    if any(p is None for p in found):
        raise RuntimeError("The store lost a passage that was put into it.")
    return [p.to(reader.device) for p in found if p is not None]


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
