"""Imports published checkpoints in the layouts of their authors' code.

`import_checkpoint` returns a `Compressor` that computes what the authors' code computes from the same weights; `import_to`
writes it as a folder for `load_compressor`. Only tensors are unpickled. Every key of a checkpoint is used, left out for a
reported reason, or refused by name.

Use the authors' prompts, token for token: `prompts.xrag_prompt`, `prompts.icae_prompt`, `prompts.pisco_prompt` (COCOM and CLaRa
too), `prompts.lclm_prompt`, `prompts.slots_first` (AutoCompressor), `prompts.gist_source` and `prompts.gist_prompt`,
`prompts.fivehundred_prompt`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..base import Compressor
from ..core.checkpoint import READER_FOLDER, download
from ..core.errors import CheckpointError
from ..reader.quiet import quiet_loading
from ..reader.reader import Reader
from ..registry import compressor_class
from .layout import MissingOption, Source, listed

# Name -> module, in the order in which `recognise` asks them.
IMPORTERS = {
    "xrag": "xrag",
    "pisco": "pisco",
    "clara": "clara",
    "arc-encoder": "arc_encoder",
    "lclm": "lclm",
    "restore-kv": "restore_kv",
    "beacon": "beacon",
    "cocom": "cocom",
    "autocompressor": "autocompressor",
    "icae": "icae",
    "500x": "five_hundred",
    "llmlingua2": "llmlingua2",
    "gist": "gist",
}

# Method -> module and class that reproduce its release.
PUBLISHED = {
    "autocompressor": ("autocompressor", "PublishedAutoCompressor"),
    "arc-encoder": ("arc_encoder", "PublishedARCEncoder"),
    "icae": ("icae", "PublishedICAE"),
    "500x": ("five_hundred", "PublishedKVMemory"),
    "beacon": ("beacon", "PublishedBeacon"),
    "gist": ("gist", "PublishedGist"),
    "lclm": ("lclm", "PublishedLCLM"),
    "pisco": ("pisco", "PublishedPISCO"),
    "xrag": ("xrag", "PublishedXRAG"),
}

__all__ = ["IMPORTERS", "MissingOption", "import_checkpoint", "import_to", "options", "published_class", "recognise"]


def _module(name: str) -> Any:
    if name not in IMPORTERS:
        raise ValueError(f"There is no importer {name!r}; there are {', '.join(IMPORTERS)}.")
    return importlib.import_module(f".{IMPORTERS[name]}", __name__)


def published_class(method: str, settings: Mapping[str, Any]) -> type[Compressor] | None:
    """The class that reproduces a method's release, if a checkpoint's settings need it; else ``None``."""
    if method not in PUBLISHED:
        return None
    config = compressor_class(method).config_class
    own = {**config.retired, **config.retired_unhashed}
    if not any(name in own and value != own[name] for name, value in settings.items()):
        return None
    module, name = PUBLISHED[method]
    found: type[Compressor] = getattr(importlib.import_module(f".{module}", __name__), name)
    return found


def options(name: str) -> dict[str, Any]:
    """Hyper-parameters of an importer, with their defaults (``None``: read from the checkpoint, or required)."""
    parameters = list(inspect.signature(_module(name).load).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def recognise(path: str | Path) -> str | None:
    """Name of the importer for the layout of a file or folder, or ``None``."""
    path = Path(path)
    return next((name for name in IMPORTERS if _module(name).recognises(path)), None)


def import_checkpoint(
    name: str,
    path: str | Path,
    reader: Reader | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    **hyper_parameters: Any,
) -> Compressor:
    """Loads a compressor from a published checkpoint.

    Args:
        name: the importer: a key of `IMPORTERS`.
        path: the checkpoint's file or folder, or a hub id.
        reader: the reader it was trained for, or its folder or hub id; not needed if the checkpoint holds the reader.
        device: device of models built from the checkpoint; ``"auto"``: CUDA if available.
        hyper_parameters: what the checkpoint does not say (see `options`).

    Returns:
        The compressor, in eval mode. Its ``reader`` is the one given or the one in the checkpoint.

    Raises:
        ValueError: for an unknown importer or hyper-parameter.
        MissingOption: if a hyper-parameter or the reader must be given.
        CheckpointError: if files or keys are missing, unknown, misshapen, not finite or unsafe to load.
    """
    return _load(name, path, reader, device, hyper_parameters)[0]


def _load(
    name: str, path: str | Path, reader: Any, device: str | torch.device, hyper_parameters: dict[str, Any]
) -> tuple[Compressor, Source]:
    module = _module(name)
    known = options(name)
    if unknown := sorted(set(hyper_parameters) - set(known)):
        raise ValueError(f"The importer {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known) or 'none'}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(path)
    if not folder.exists():
        folder = download(str(path), pickles=True)
    if reader is not None and isinstance(reader, str | Path):
        reader = Reader.from_pretrained(reader, device=device)
    source = Source(folder, reader, device=device)
    try:
        return module.load(source, **hyper_parameters).eval(), source
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be imported as {name}: {error}") from error


def import_to(
    name: str,
    path: str | Path,
    out: str | Path,
    reader: Reader | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    **hyper_parameters: Any,
) -> dict[str, str]:
    """Imports a checkpoint and writes it atomically as a folder for `load_compressor`.

    The folder holds ``config.json``, ``model.safetensors`` and, if the checkpoint holds weights of the reader, that reader as
    a Hugging Face folder ``reader``, which `load_compressor` then uses.

    Args:
        out: the folder to write; it must not exist or be empty.
        name, path, reader, device, hyper_parameters: as in `import_checkpoint`.

    Returns:
        Keys that were left out, with the reason.

    Raises:
        ValueError: if ``out`` is taken; and as in `import_checkpoint`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty; name a new folder.")
    compressor, source = _load(name, path, reader, device, hyper_parameters)
    whole = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    whole.mkdir(parents=True)
    try:
        if compressor.base_reader is not source.reader and compressor.interface != "text":
            with quiet_loading():
                compressor.base_reader.save_pretrained(whole / READER_FOLDER)
        compressor.save_pretrained(whole)
        if hasattr(_module(name), "write_extras"):
            _module(name).write_extras(compressor, whole)
        if out.exists():
            out.rmdir()
        os.replace(whole, out)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
    return source.ignored


def import_recognised(path: Path, reader: Reader | None, **hyper_parameters: Any) -> Compressor | None:
    """Imports a file or folder of any known layout; ``None`` if the layout is unknown."""
    name = recognise(path)
    return None if name is None else import_checkpoint(name, path, reader, **hyper_parameters)


def describe_ignored(ignored: dict[str, str]) -> list[str]:
    """One line per reason, with the keys left out for it."""
    reasons: dict[str, list[str]] = {}
    for key, reason in ignored.items():
        reasons.setdefault(reason, []).append(key)
    return [f"{reason}: {listed(keys, 3)}" for reason, keys in reasons.items()]
