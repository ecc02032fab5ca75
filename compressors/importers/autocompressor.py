"""AutoCompressor checkpoints, Llama and OPT: the tuned model's usual keys and its summary embeddings."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import CheckpointError
from ..soft.autocompressor import AutoCompressor, AutoCompressorConfig
from .layout import Source, load_model_state, peek_json
from .models import build_model, load_tokenizer, make_reader, model_config

_SUMMARY = "embed_summary.weight"
_OWN_SETTINGS = ("summary_length", "accumulate_summary", "segment_gradient_checkpointing")


def recognises(path: Path) -> bool:
    """Whether it has AutoCompressor's layout."""
    return "summary_length" in peek_json(path / "config.json")


def load(
    source: Source,
    *,
    segment_tokens: int = 2048,
    equal_segments: bool = False,
    accumulate_summary: bool | None = None,
) -> AutoCompressor:
    """Imports AutoCompressor; the checkpoint holds its reader. Its prompt: `nutgraf.compressors.importers.prompts.slots_first`.

    Args:
        source: a Hugging Face folder with ``embed_summary.weight`` among the weights.
        segment_tokens: longest segment; the authors' code leaves it to the caller, and trained on up to 2,048.
        equal_segments: cut a passage into equally long segments; default: as the authors' code cuts, every segment but the
            last of ``segment_tokens``. (`AutoCompressor.encode_ids` takes any lengths.)
        accumulate_summary: default: as the config says.
    """
    path = source.path
    settings = source.config()
    keys = source.keys(load_model_state(path))
    length = settings.get("summary_length")
    summary = keys.take(_SUMMARY, (length, None))
    if settings.get("model_type") not in ("llama", "opt"):
        raise CheckpointError(f"{path}: AutoCompressors are Llama or OPT models, got {settings.get('model_type')!r}.")
    config = model_config(settings, path, drop=_OWN_SETTINGS)
    model = build_model(config, keys.take_all(r"(?=model\.|lm_head\.)"), path)
    keys.done()
    reader = make_reader(model, load_tokenizer(path, source), source)
    if summary.shape[1] != reader.width:
        raise CheckpointError(f"{path}: {_SUMMARY} is {tuple(summary.shape)}, wanted width {reader.width}.")
    kept = settings.get("accumulate_summary", True) if accumulate_summary is None else accumulate_summary
    settled = AutoCompressorConfig.faithful(
        summary_length=len(summary),
        ratio=max(1.0, segment_tokens / len(summary)),
        segment_tokens=segment_tokens,
        equal_segments=equal_segments,
        as_prompt=True,
        accumulate_summary=bool(kept),
        tuning="none",
        adapt_reader=False,
        target_modules=None,
    )
    try:
        compressor = AutoCompressor(settled, reader)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.no_grad():
        compressor.summary.copy_(summary)
    return compressor
