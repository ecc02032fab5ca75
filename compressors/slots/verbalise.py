"""Verbalises slots: the vocabulary's tokens whose embeddings lie nearest."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ..core.passage import CompressedPassage
from ..reader.reader import Reader

_ROWS = 8192  # rows of the vocabulary whose products exist at the same time


@torch.no_grad()
def nearest_tokens(reader: Reader, passage: CompressedPassage, top: int = 5) -> list[list[str]]:
    """The ``top`` tokens with the greatest cosine to each slot, the nearest first (Gist-COCO, arXiv 2402.16058).

    Raises:
        ValueError: if the passage has another interface than embeds, or ``top`` is not a number of tokens.
    """
    if passage.embeds is None:
        raise ValueError(f"Only slots of interface 'embeds' can be verbalised, got {passage.interface!r}.")
    if not 1 <= top <= reader.vocab_size:
        raise ValueError(f"top must lie in 1..{reader.vocab_size}, got {top}.")
    slots = normalize(passage.embeds.float(), dim=-1).to(reader.device)
    parts = [
        slots @ normalize(reader.embed(ids.to(reader.device)).float(), dim=-1).T
        for ids in torch.arange(reader.vocab_size).split(_ROWS)
    ]
    found = torch.cat(parts, dim=-1).topk(top, dim=-1).indices.tolist() if len(slots) else []
    return [[reader.decode([i]) for i in row] for row in found]
