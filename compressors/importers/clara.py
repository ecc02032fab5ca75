"""CLaRa checkpoints: the layout of the first PISCO, with a third LoRA adapter that encodes questions."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import CheckpointError
from .cocom import ADAPTERS, QUESTIONS, build
from .layout import Source, listed, load_pickle, peek_json
from .pisco import PublishedPISCO

_NEEDED = ("encoder_adapter", "decoder_adapter")


def recognises(path: Path) -> bool:
    """Whether it has CLaRa's layout."""
    return path.is_dir() and peek_json(path / "config.json").get("model_type") == "CLaRa"


def load(
    source: Source,
    *,
    compr_rate: float | None = None,
    doc_max_length: int | None = None,
    different_mem_tokens: bool | None = None,
    lora_alpha: float | None = None,
) -> PublishedPISCO:
    """Imports CLaRa (arXiv 2511.18659).

    A segment ``[ENC][BOS][at most 256 tokens][EOS]`` and one repeated memory token give ``doc_max_length // compr_rate`` last
    hidden states as slots, however short the segment is. `PublishedPISCO.relevance` ranks passages for a question, if the
    checkpoint holds the third adapter (CLaRa-E2E). Its prompt is ``pisco_prompt(..., form="2025")``.

    Args:
        source: the folder, with ``adapters.pth`` and ``decoder_first_last_layers.pth``; it needs the reader (the base decoder).
            The config's ``compr_model_name`` names a model that CLaRa never loads.
        compr_rate, doc_max_length, different_mem_tokens: default: the config's.
        lora_alpha: default: twice the rank, as in the authors' code.
    """
    path = source.path / ADAPTERS
    if not path.is_file():
        raise CheckpointError(
            f"{source.path} lacks {ADAPTERS}; only CLaRa checkpoints with LoRA adapters are supported."
        )
    held = load_pickle(path)
    if missing := [name for name in _NEEDED if not isinstance(held, dict) or name not in held]:
        raise CheckpointError(f"{path} lacks {listed(missing)}.")
    made = build(source, compr_rate, doc_max_length, different_mem_tokens, lora_alpha, (*_NEEDED, QUESTIONS))
    if made.base_reader.tokenizer.bos_token_id is None:
        raise CheckpointError(
            f"{source.path} was trained with a BOS token, and its tokenizer has none; set bos_token in it."
        )
    return made
