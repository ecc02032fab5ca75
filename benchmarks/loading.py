"""Readers, compressors with their ratios, and question files by the names of the command line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters.store import Encoding
from ..compressors import Reader
from ..compressors.reader.loading import as_dtype
from ..recipes.data.corpus import Record, read_records
from .metrics import containment

SAMPLE = Path(__file__).resolve().parent / "sample"
SAMPLE_QUESTIONS = SAMPLE / "squad_dev.jsonl"
SAMPLE_ARTICLES = SAMPLE / "articles.txt"


@dataclass(frozen=True)
class CompressorSpec:
    """A compressor as the command line names it: `NAME` or `NAME@RATIO,RATIO`.

    `name` is a shipped compressor, a folder, a hub id, or a method that needs no training (`selective-context`), then also
    with settings: `kv-match:budget=uniform,repair=none`.
    """

    name: str
    ratios: tuple[float | None, ...]

    @classmethod
    def parse(cls, text: str, ratios: Sequence[float] = ()) -> CompressorSpec:
        """Read a spec; `ratios` count if it names none. Raises ValueError for a ratio that is no number of at least 1."""
        name, at, listed = text.rpartition("@") if "@" in text else (text, "", "")
        try:
            own = [float(part) for part in listed.split(",")] if at else list(ratios)
        except ValueError as error:
            raise ValueError(f"{text!r} is not NAME or NAME@RATIO,RATIO, such as kv-match@4,8.") from error
        if not name or any(not ratio >= 1 for ratio in own):
            raise ValueError(f"{text!r} needs a name and ratios of at least 1, such as kv-match@4,8.")
        return cls(name, tuple(own) or (None,))


def pick_device(name: str) -> str:
    """The device of a name; `auto`: CUDA if there is any, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def find_reader(name: str, device: str = "auto", dtype: str = "auto") -> Reader:
    """A shipped reader by name, or one from a folder or the hub.

    Args:
        device: See `pick_device`.
        dtype: `auto`: float32 on the CPU, else the checkpoint's own.
    """
    device = pick_device(device)
    return Reader.from_pretrained(name, device=device, dtype=torch_dtype(dtype, device))


def torch_dtype(name: str, device: str) -> torch.dtype | str:
    """The dtype for `Reader.from_pretrained`, from `auto` or a name."""
    if name == "auto":
        return torch.float32 if device == "cpu" else "auto"
    return as_dtype(name)


def store_encoding(precision: str) -> Encoding:
    """Encoding of a store by name. Raises ValueError for another than int8, int4, float16, bfloat16 or float32."""
    if precision in ("int8", "int4"):
        return Encoding(quantize=precision)  # type: ignore[arg-type]
    try:
        return Encoding(dtype=precision)
    except ValueError as error:
        raise ValueError(
            f"A store keeps slots as int8, int4, float16, bfloat16 or float32, got --store-precision {precision}."
        ) from error


def find_records(
    path: str, half: str | None = None, limit: int | None = None, *, passages: int | None = None
) -> list[Record]:
    """Questions of a JSON-lines file (`sample`: the shipped one), evenly spread over it under a `limit`.

    Args:
        passages: Passages per question, see `with_passages`; distractors come from the whole half, whatever the limit.

    Raises ValueError if no question is left, or there are too few passages.
    """
    records = read_records(SAMPLE_QUESTIONS if path == "sample" else path, half=half)
    if not records:
        raise ValueError(f"{path} holds no questions" + (f' of the half "{half}".' if half else "."))
    if limit is not None and limit < len(records):
        if limit < 1:
            raise ValueError(f"A limit must be at least 1, got {limit}.")
        pool, records = records, [records[i * len(records) // limit] for i in range(limit)]
    else:
        pool = records
    return records if passages is None else with_passages(records, passages, pool=pool)


def dataset_name(path: str) -> str:
    """Name of a question file in rows: without folders and endings."""
    return "squad_sample" if path == "sample" else Path(path).name.split(".")[0]


def with_passages(records: Sequence[Record], n: int, *, pool: Sequence[Record] = (), seed: int = 0) -> list[Record]:
    """The records with `n` passages each: the gold one and n - 1 distractors, in random order.

    A record's own distractors are drawn first, then passages of other records in `pool` (default `records`) that hold none of
    its answers. The draw depends on the record, `pool` and `seed` alone.

    Raises:
        ValueError: If n is less than 1, or there are not enough passages without the answer.
    """
    if n < 1:
        raise ValueError(f"A question needs at least one passage, got {n}.")
    # title by text: a passage that several records share is one passage
    titles = {text: title for record in (pool or records) for text, title in zip(record.passages, record.titles)}
    texts = list(titles)
    return [
        _redrawn(record, n, texts, titles, random.Random(f"{seed}/{record.id or record.question}"))
        for record in records
    ]


def _redrawn(record: Record, n: int, texts: Sequence[str], titles: dict[str, str], rng: random.Random) -> Record:
    gold = [] if record.gold is None else [record.gold]
    others = [i for i in range(len(record.passages)) if i != record.gold]
    kept = [*gold, *rng.sample(others, min(len(others), n - len(gold)))]
    chosen = [(record.passages[i], record.titles[i]) for i in kept]
    own = set(record.passages)
    for k in rng.sample(range(len(texts)), len(texts)) if len(chosen) < n else ():
        if texts[k] not in own and not containment(texts[k], record.answers):
            chosen.append((texts[k], titles[texts[k]]))
            if len(chosen) == n:
                break
    if len(chosen) < n:
        raise ValueError(
            f"Question {record.id or record.question!r} finds only {len(chosen)} of {n} passages: all others hold its answer "
            "or are its own. Ask for fewer passages, or give a file with more."
        )
    order = rng.sample(range(n), n)
    passages, names = zip(*(chosen[i] for i in order))
    return replace(record, passages=passages, titles=names, gold=None if record.gold is None else order.index(0))
