"""What a benchmark's command line names: readers, compressors with their ratios, question files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.store import Encoding
from ..compressors import COMPRESSORS, Compressor, Reader, load_compressor, make_compressor
from ..compressors.reader.loading import as_dtype
from ..recipes.data.corpus import Record, read_records
from ..shipped import locate
from .distractors import with_passages

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
        """Read a spec; `ratios` are for those that name none themselves.

        Raises ValueError if a ratio is not a number of at least 1.
        """
        name, at, listed = text.rpartition("@") if "@" in text else (text, "", "")
        try:
            own = [float(part) for part in listed.split(",")] if at else list(ratios)
        except ValueError as error:
            raise ValueError(f"{text!r} is not NAME or NAME@RATIO,RATIO, such as icae-small@4,8.") from error
        if not name or any(not ratio >= 1 for ratio in own):
            raise ValueError(f"{text!r} needs a name and ratios of at least 1, such as icae-small@4,8.")
        return cls(name, tuple(own) or (None,))


def find_reader(name: str, device: str = "auto", dtype: str = "auto") -> Reader:
    """A shipped reader by name, or one from a folder or the hub.

    Args:
        device: `auto` takes CUDA where there is one.
        dtype: `auto` takes float32 on the CPU, where it is exact and often faster, and the checkpoint's own elsewhere.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return Reader.from_pretrained(locate(name), device=device, dtype=torch_dtype(dtype, device))


def hide_loading_bars() -> None:
    """No progress bars of `transformers` for weights that load in a moment; for command lines, as it holds everywhere."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def torch_dtype(name: str, device: str) -> torch.dtype | str:
    """What `Reader.from_pretrained` takes for `auto` or the name of a floating dtype."""
    if name == "auto":
        return torch.float32 if device == "cpu" else "auto"
    return as_dtype(name)


def find_compressor(name: str, reader: Reader) -> Compressor:
    """A shipped compressor by name, one from a folder or the hub, or a method that needs no training.

    Raises ValueError for settings that are not `key=value`.
    """
    method, colon, written = name.partition(":")
    cls = COMPRESSORS.get(method)
    if cls is not None and cls.training_free:
        pairs = [part.partition("=") for part in written.split(",")] if colon else []
        if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
            raise ValueError(f"{name!r}: {bad[0]!r} is no setting; write {method}:key=value,key=value.")
        settings = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
        return load_compressor(method, reader, **settings)
    if cls is not None and cls.interface == "text":
        return make_compressor(name, reader)
    return load_compressor(locate(name), reader)


def store_encoding(precision: str) -> Encoding:
    """How a store keeps slots in a precision that the command line names.

    Raises ValueError for another name than int8, int4, float16, bfloat16 or float32.
    """
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
    """Questions of a JSON-lines file (`sample` names the shipped one), evenly spread over it when limited.

    Args:
        passages: so many of them a question, see `with_passages`; the whole half tops up, whatever the limit.

    Raises ValueError if no question is left, or `with_passages` finds too few passages.
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
    """What rows call a question file: its name without folders and endings."""
    return "squad_sample" if path == "sample" else Path(path).name.split(".")[0]
