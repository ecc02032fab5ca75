"""`nutgraf doctor`: what is installed, what this machine can do, and whether a reader reads every kind of passage rightly."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from typer import Exit, Option

from ...compressors import COMPRESSORS, CompressedPassage, Reader, load_compressor
from ...compressors.kv.encode import cached_layers
from ...compressors.reader.checks import check_reads_slots
from ...compressors.reader.packaged import INSTALL, cache_folder, is_installed
from ...compressors.reader.tokenization import TokenIds
from ...recipes.data.templates import question_prompt
from ..loading import find_reader, pick_device
from .expand import takes

PACKAGE = "nutgraf"
DEFAULT = "reader-smollm2"
PASSAGE = "The bridge over the Aare was opened in 1883. It was built by Gottlieb Ott and it is 229 metres long."
QUESTION = "When was the bridge opened?"
TAIL = f"\n\nQuestion: {QUESTION}\nAnswer:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT = {"ok": "green", "note": "yellow", "fault": "red"}


@dataclass(frozen=True)
class Finding:
    """One sentence. ``fault``: something that must be mended; ``note``: something that is not there, or slow."""

    level: Literal["ok", "note", "fault"]
    text: str


@dataclass(kw_only=True)
class DoctorSettings:
    reader: Annotated[
        str | None,
        Option("--reader", "-r", help=f"Reader to examine: shipped, a folder or a hub id; default: {DEFAULT}."),
    ] = None
    device: Annotated[str, Option(help="Where it runs: auto, cpu, cuda, ...")] = "auto"
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto"


@takes(DoctorSettings)
def doctor(settings: DoctorSettings) -> None:
    """Examine the installation, the machine and a reader in under a minute; exit status 1 if something is wrong."""
    console = Console(soft_wrap=True, highlight=False)
    faults = 0
    for finding in examine(settings):
        console.print(f"{finding.level:<5}", style=_WEIGHT[finding.level], end=" ")
        console.print(finding.text, markup=False)
        faults += finding.level == "fault"
    if faults:
        raise Exit(1)


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """Yield the findings, the quick ones first."""
    yield from versions()
    yield from extras()
    yield from machine(pick_device(settings.device))
    if settings.reader is None and not is_installed():
        yield Finding("note", f"No reader was examined: {DEFAULT} needs a package that is not installed ({INSTALL}).")
        return
    try:
        reader = find_reader(settings.reader or DEFAULT, settings.device, settings.dtype)
    except (ValueError, OSError, ImportError, RuntimeError, AssertionError) as error:
        yield Finding("fault", f"The reader cannot be loaded: {_sentence(error)}")
        return
    yield from reading(reader)
    yield self_test(reader)


def versions(package: str = PACKAGE) -> Iterator[Finding]:
    """Versions of the packages that every installation needs."""
    wanted = [one for one in _requirements(package) if one.marker is None or one.marker.evaluate({"extra": ""})]
    have = {one.name: _version(one.name) for one in wanted}
    shown = ", ".join(f"{name} {have[name]}" for name in ("torch", "transformers") if have.get(name))
    yield Finding("ok", f"{package} {_version(package)} with Python {platform.python_version()}, {shown}.")
    for one in wanted:
        version = have[one.name]
        if version is None:
            yield Finding("fault", f"{one.name} is not installed: pip install '{one.name}{one.specifier}'.")
        elif not one.specifier.contains(version, prereleases=True):
            need = f"{one.name}{one.specifier}"
            yield Finding(
                "fault", f"{one.name} {version} is installed, but {package} needs {need}: pip install '{need}'."
            )


def extras(package: str = PACKAGE) -> Iterator[Finding]:
    """Which optional parts are there."""
    names = importlib.metadata.metadata(package).get_all("Provides-Extra") or []
    missing = {name: _missing(package, name) for name in names if name not in ("dev", "docs")}
    if there := [name for name, lacks in missing.items() if not lacks]:
        yield Finding("ok", f"Extras installed: {', '.join(there)}.")
    for name, lacks in missing.items():
        if lacks:
            yield Finding("note", f"The extra {name} lacks {', '.join(lacks)}: pip install '{package}[{name}]'.")


def _missing(package: str, extra: str) -> list[str]:
    """Packages of an extra that are absent or too old."""
    found: list[str] = []
    for one in _requirements(package):
        if one.marker is None or one.marker.evaluate({"extra": ""}) or not one.marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(one.name) == package:  # an extra that takes in others
            found += [each for other in one.extras for each in _missing(package, other)]
            continue
        version = _version(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            found.append(f"{one.name}{one.specifier}")
    return list(dict.fromkeys(found))


def _requirements(package: str) -> list[Requirement]:
    return [Requirement(line) for line in importlib.metadata.requires(package) or []]


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def machine(device: str) -> Iterator[Finding]:
    """Devices, memory, and which dtype is fast on the device that will be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    held = ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    yield Finding(
        "ok", f"CPU with {cores} cores, of which torch uses {torch.get_num_threads()}; GPU: {held or 'none'}."
    )
    with suppress(ValueError, OSError, AttributeError):  # not on every system
        page, free, whole = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        level: Any = "ok" if page * free > 2**30 else "note"
        yield Finding(level, f"{page * free / 2**30:.1f} of {page * whole / 2**30:.1f} GiB of memory are free.")
    place = cache_folder()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    left = shutil.disk_usage(existing).free
    full = left < 2**30
    yield Finding("note" if full else "ok", f"{left / 2**30:.0f} GiB of disk are free for unpacked models, in {place}.")
    speeds = {name: speed(dtype, device) for name, dtype in _DTYPES.items()}
    said = ", ".join(f"{name} {value:,.0f}" if value >= 1 else f"{name} under 1" for name, value in speeds.items())
    fastest = max(speeds, key=lambda name: speeds[name])
    faster = device == "cpu" and speeds[fastest] > 1.5 * speeds["float32"]  # there readers run in float32 by default
    advice = f" A reader may be faster with --dtype {fastest}." if faster else ""
    yield Finding("ok", f"Matrix products on {device}, in GFLOP/s: {said}.{advice}")


def speed(dtype: torch.dtype, device: str, size: int = 512, seconds: float = 0.3) -> float:
    """GFLOP/s of square matrix products; 0 if the device cannot do them."""
    try:
        a = torch.ones(size, size, dtype=dtype, device=device)
        a @ a
        done, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds:
            float((a @ a)[0, 0])  # waits for the device
            done += 1
    except (RuntimeError, NotImplementedError, AssertionError):  # the last one: a torch without CUDA
        return 0.0
    return 2e-9 * size**3 * done / taken


def reading(reader: Reader) -> Iterator[Finding]:
    """Which kinds of passages the reader takes: it must read a passage's own states as it reads the passage's text."""
    ids = reader.tokenize(PASSAGE)
    wanted = _logits(reader, [TokenIds((*reader.bos_ids, *ids)), TAIL])
    kinds: list[tuple[str, str, Callable[[], CompressedPassage]]] = [
        ("prompt embeddings", "soft tokens, as of icae or xrag", lambda: _embeds(reader)),
        ("keys and values, the same slots in every head", "as of 500x or gist", lambda: _dense(reader, ids)),
        ("keys and values, other slots in every head", "as of kv-match", lambda: _ragged(_dense(reader, ids))),
    ]
    for name, methods, make in kinds:
        try:
            off = float((_logits(reader, [make(), TAIL]) - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            yield Finding("note", f"{reader.name} takes no {name} ({methods}): {_sentence(error)}")
            continue
        if off <= (1e-3 if reader.dtype == torch.float32 else 0.1):
            yield Finding("ok", f"{reader.name} takes {name} ({methods}), and reads them as it reads text.")
        else:
            yield Finding(
                "fault", f"{reader.name} misreads {name} ({methods}): its scores are {off:.1%} off those of the text."
            )


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if said.endswith(".") else f"{said}."


def _logits(reader: Reader, prompt: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        (found,) = reader.target_logits([prompt], [[reader.tokenize(" the")[0]]])
    return found[0].float().cpu()


def _embeds(reader: Reader) -> CompressedPassage:
    check_reads_slots(reader)
    return reader.identity(PASSAGE)


@torch.no_grad()
def _dense(reader: Reader, ids: list[int]) -> CompressedPassage:
    """The reader's own keys and values of the passage, all of them."""
    whole = torch.tensor([[*reader.bos_ids, *ids]], device=reader.device)
    at = torch.arange(whole.shape[1], device=reader.device)
    layers = cached_layers(reader.model.get_decoder(), reader.embed(whole), torch.ones_like(whole), at[None])
    first = len(reader.bos_ids)
    keys, values = (tuple(pair[kind][0, :, first:].clone() for pair in layers) for kind in (0, 1))
    positions = at[first:]
    return CompressedPassage("kv", len(ids), "own", reader.fingerprint, keys=keys, values=values, positions=positions)


def _ragged(dense: CompressedPassage) -> CompressedPassage:
    """The same pairs, listed head by head."""
    keys, values, at = dense.keys or (), dense.values or (), dense.positions
    counts = torch.tensor([[k.shape[1]] * k.shape[0] for k in keys], dtype=torch.int32)
    return CompressedPassage(
        "kv",
        dense.source_tokens,
        "own",
        dense.reader,
        keys=(torch.cat([k.flatten(0, 1) for k in keys]),),
        values=(torch.cat([v.flatten(0, 1) for v in values]),),
        positions=at.repeat(counts.numel()),  # type: ignore[union-attr]
        counts=counts,
        span=(int(at[0]), dense.source_tokens),  # type: ignore[index]
    )


def self_test(reader: Reader) -> Finding:
    """Answer a question from a text, and from it compressed by the first method that needs no training and keeps keys."""
    start = time.perf_counter()
    name = next(name for name, cls in COMPRESSORS.items() if cls.training_free and cls.interface == "kv")
    (plain,) = reader.generate([question_prompt([PASSAGE], QUESTION)], 12, stop=["\n"])
    said = f"Self-test: asked {QUESTION!r}, {reader.name} answers {plain.strip()!r} from the text"
    try:
        (passage,) = load_compressor(name, reader).compress([PASSAGE], ratio=2)
        (short,) = reader.generate([question_prompt([passage], QUESTION)], 12, stop=["\n"])
    except ValueError as error:
        return Finding("note", f"{said}; {name} does not work with it: {_sentence(error)}")
    seconds = time.perf_counter() - start
    return Finding("ok", f"{said}, and {short.strip()!r} from half of its keys and values ({name}; {seconds:.0f} s).")
