"""Checks that a state-space reader reads embeddings as it reads text."""

from __future__ import annotations

import torch

from .reader import Reader
from .tokenization import TokenIds

_PROBE, _SHORT = "The treaty was signed in 1648.", "It was."


def check_reads_slots(reader: Reader) -> None:
    """Raises ``ValueError`` for a state-space reader that would misread compressed passages.

    Some (Mamba) read embeddings as they read text; others (RWKV) ignore padding or take no embeddings. So two texts of
    unequal length are read both ways. Transformers are not probed.
    """
    if not getattr(reader.model, "_is_stateful", False):
        return
    passage, short = reader.tokenize(_PROBE), reader.tokenize(_SHORT)
    prompts = [[TokenIds((*reader.bos_ids, *short))], [TokenIds((*reader.bos_ids, *passage, *short))]]
    try:
        with torch.no_grad():
            wanted = [reader.forward(reader.plan([prompt]))[0][0, -1] for prompt in prompts]
            slots = [reader.identity(_PROBE), TokenIds(tuple(short))]
            found = reader.forward(reader.plan([prompts[0], slots]))[0][:, -1]  # padded on the left, as for answers
        reads = all(map(_close, found, wanted))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        reads = False
    if not reads:
        raise ValueError(
            f"{reader.name!r} ({type(reader.model).__name__}) is a state-space model that does not read embeddings in a padded "
            "batch as it reads text, so that compressed passages would be misread; use a transformer as the reader, or give "
            "this model text, with a text compressor if you like, through one of LlamaIndex's own LLM classes."
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))
