"""RestoreKV checkpoints: a PEFT adapter and the embeddings of the restore tokens."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..core.errors import CheckpointError
from ..kv.restore import RestoreCompressor, RestoreConfig
from ..reader.lora import not_lora
from .layout import Source, load_tensors, number, read_json
from .models import body_prefix, drop_idle, fill_lora, lora_shape, take_lora

EMBEDDINGS = "restore_embeddings"
# Must be off: layers have one rank and scale, and weights are not transposed.
_UNIFORM = ("alpha_pattern", "rank_pattern", "fan_in_fan_out")


def recognises(path: Path) -> bool:
    """Whether it has RestoreKV's layout."""
    return (path / f"{EMBEDDINGS}.safetensors").is_file()


def load(source: Source, *, score: str = "kvzip", ratio: float = 4.0) -> RestoreCompressor:
    """Imports RestoreKV (arXiv 2608.01247), as kvpress loads it.

    The keys and values at the restore tokens are the release's. The pairs beside them are those of the highest score in each
    head; the release gives heads different numbers of them.

    Args:
        source: the folder, with ``adapter_config.json``, ``adapter_model.safetensors`` and ``restore_embeddings.safetensors``;
            it needs the reader.
        score: what ranks the pairs: ``"kvzip"``, or ``"kvzip+"`` for the checkpoints whose name ends in ``plus``.
        ratio: compression ratio if none is asked for.
    """
    path = source.path
    reader = source.need_reader("holds no reader")
    settings = read_json(path / "adapter_config.json")
    for name, value in (not_lora(settings) | {k: settings[k] for k in _UNIFORM if settings.get(k)}).items():
        raise CheckpointError(
            f"{path}/adapter_config.json sets {name!s:.60} to {value!r:.60}; supported is LoRA of one rank and scale."
        )
    rows = source.keys(load_tensors(path / f"{EMBEDDINGS}.safetensors"))
    memory = rows.take(EMBEDDINGS, (None, reader.width))
    rows.done()
    keys = source.keys(load_tensors(path / "adapter_model.safetensors"))
    lora = take_lora(keys, r"base_model\.model\." + re.escape(body_prefix(reader.model)))
    keys.done()
    rank, targets = lora_shape(lora, path)
    alpha = number(settings.get("lora_alpha"), "lora_alpha", path / "adapter_config.json")
    config = RestoreConfig(
        restore_tokens=len(memory),
        score=score,
        ratio=ratio,
        r=rank,
        alpha=alpha * rank**0.5 if settings.get("use_rslora") else alpha,
        target_modules=tuple(targets),
    )
    compressor = RestoreCompressor(config, reader)
    drop_idle(compressor.encoder, lora, source)
    fill_lora(compressor.encoder, lora, path)
    with torch.no_grad():
        compressor.memory.copy_(memory)
    return compressor
