"""Two-stream language modelling: a document is compressed once, and every chunk of it is read after the slots before it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..slots.segments import window_lengths
from .language_modeling import LanguageModelingLoss


def two_stream_losses(
    compressor: Any, texts: Sequence[str], rng: random.Random, ratio: float | None = None
) -> tuple[Tensor, int]:
    """Sum of the token losses over all chunks but the first of all documents, and the number of predicted tokens.

    One pass of the encoder gives the slots of a document. The reader predicts token j of chunk i from the slots of the windows
    that end before chunk i, and from the chunk's tokens before j (arXiv 2401.07793, section 3.2). In the paper each token
    of a chunk sees the slots through one mask over the whole text; here each chunk is a prompt of its own, which is the same
    for chunks that see no other chunk's tokens. Tokens between the last whole window and the chunk are part of the prompt, as
    text.

    Args:
        compressor: compresses windows of ``ratio`` tokens to one slot each, causally; its config has ``stream_tokens``.
        texts: the documents. One of a single chunk gives no loss.
        rng: unused.
        ratio: tokens per slot; default: the config's.
    """
    reader, size = compressor.reader, compressor.config.stream_tokens
    ratio = compressor.ratio_or_default(ratio) or 1.0
    prompts, targets = [], []
    for passage, ids in zip(compressor.encode(texts, None, ratio), reader.tokenize_batch(texts)):
        ends = torch.tensor(window_lengths(len(ids), ratio)).cumsum(0)
        for start in range(size, len(ids), size):
            slots = int((ends <= start).sum())
            if not slots:
                continue  # windows longer than the chunk
            covered = int(ends[slots - 1])
            lead, chunk = ids[covered:start], ids[start : start + size]
            prompts.append([replace(passage, embeds=passage.embeds[:slots])])
            targets.append((lead, chunk))
    if not prompts:
        return torch.zeros((), device=reader.device), 0
    found = reader.target_hidden(prompts, [[*lead, *chunk] for lead, chunk in targets])
    scored = torch.tensor([i >= len(lead) for lead, chunk in targets for i in range(len(lead) + len(chunk))])
    scored = scored.to(found.ids.device)
    hidden, chosen = found.hidden[scored], found.ids[scored]
    return LanguageModelingLoss(reader.head)(hidden, chosen, num_items=1), len(chosen)
