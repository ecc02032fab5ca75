"""500xCompressor checkpoints: memory embeddings and LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..core.errors import CheckpointError
from ..encoders.lora_twin import short_name
from ..kv.five_hundred import KVMemoryCompressor, KVMemoryConfig
from .layout import PICKLES, Source, load_tensors, single_file
from .models import body_prefix, fill_lora, lora_shape, take_lora

_MEMORY = "memory_embeddings"


def recognises(path: Path) -> bool:
    """Whether it has 500xCompressor's layout."""
    try:
        file = single_file(path)
        return file.suffix in {".safetensors", *PICKLES} and _MEMORY in load_tensors(file)
    except CheckpointError:
        return False


def load(
    source: Source, *, lora_alpha: float = 32.0, pad_to: int | None = None, bos: bool = False
) -> KVMemoryCompressor:
    """Imports 500xCompressor.

    Args:
        source: a file, or a folder with one file, of ``memory_embeddings`` and ``llama.*``; it needs the reader.
        lora_alpha: the release has 32.
        pad_to: pad each passage with EOS to this length and attend to the padding, as the release does (to 500, say); it
            changes what the slots hold. Longer passages become several segments.
        bos: passages open with BOS, which the authors' code leaves out.
    """
    path = source.path
    reader = source.need_reader("holds a 500xCompressor without its reader")
    keys = source.keys(load_tensors(single_file(path)))
    memory = keys.take(_MEMORY, (1, None, reader.width))[0]
    lora = take_lora(keys, r"llama\.(?:base_model\.model\.)?" + re.escape(body_prefix(reader.model)))
    keys.done()
    rank, targets = lora_shape(lora, path)
    config = KVMemoryConfig.faithful(
        num_mem=len(memory),
        r=rank,
        alpha=float(lora_alpha),
        target_modules=tuple(targets),
        pad_to=pad_to,
        segment_tokens=pad_to,
        bos=bos,
        as_prompt=True,
    )
    try:
        compressor = KVMemoryCompressor(config, reader)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit the reader {reader.name!r}: {error}") from error
    decoder = compressor.encoder.decoder
    idle = {short_name(n) for n, _ in decoder.named_parameters() if "lora_" in n} - set(compressor.encoder.lora)  # type: ignore[arg-type]
    for name in [n for n in lora if short_name(n) in idle]:
        source.ignored[name] = "LoRA of the last layer that no key or value depends on"
        del lora[name]
    fill_lora(compressor.encoder, lora, path)  # type: ignore[arg-type]
    with torch.no_grad():
        compressor.memory.copy_(memory)
    return compressor
