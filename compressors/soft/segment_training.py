"""AutoCompressor's own objective: language modelling over the segments of a document, each read behind the summaries so far."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..objectives.language_modeling import LanguageModelingLoss

if TYPE_CHECKING:
    from .autocompressor import AutoCompressor


def random_segments(length: int, count: int, longest: int, rng: random.Random) -> list[int]:
    """Cuts a document into segments of random lengths (arXiv 2305.14788, section 3.3).

    Every segment has at least ``max(ceil((length - longest) / (count - 1)), 2)`` tokens, which keeps each below
    ``longest``; break points drawn uniformly divide the tokens that are left over.

    Args:
        length: tokens of the document.
        count: segments wanted. A document too short for them gets fewer, one too long for them more.
        longest: tokens that one segment may have.
        rng: where the break points come from.

    Returns:
        Lengths of the segments, which add up to ``length``; none for an empty document.
    """
    if not length:
        return []
    fewest = -(-length // longest)
    count = max(min(count, length // 2), fewest, 1)
    if count == 1:
        return [length]
    while 2 * count <= length:
        least = max(-(-(length - longest) // (count - 1)), 2)
        free = length - least * count
        if free >= 0:
            breaks = [0, *sorted(rng.randint(0, free) for _ in range(count - 1)), free]
            return [least + b - a for a, b in zip(breaks, breaks[1:])]
        count += 1
    # No choice is left: segments of two tokens at the most, or hardly more tokens than segments.
    size = -(-length // fewest)
    return [min(size, length - start) for start in range(0, length, size)]


def segment_losses(
    compressor: AutoCompressor, texts: Sequence[str], rng: random.Random, ratio: float | None = None
) -> tuple[Tensor, int]:
    """The sum of the token losses over all segments of all documents, and the number of predicted tokens.

    The segments of a document are read one after the other, each behind the soft prompt that the ones before it left; the
    last token of a segment predicts the first of the next. Gradients flow through the soft prompt inside a substep of
    ``segments_per_substep`` segments and stop between substeps. The first token of a document is predicted from BOS, where
    the compressor puts one. (The authors' code leaves out the one token at each border between substeps.)

    All first segments of the batch are read in one pass, then all second ones, and so on. Where the reader is not adapted,
    it reads the segments as it is and the encoder only makes the summaries.

    Args:
        compressor: the compressor.
        texts: the documents.
        rng: where the segments' lengths come from.
        ratio: compression ratio; ``None``: the config's.

    Returns:
        A scalar that is differentiable in what trains, and the number of tokens it is a sum over.

    Raises:
        ValueError: if a document's summaries and a segment do not fit the reader's positions.
    """
    config, reader = compressor.config, compressor.reader
    ratio = config.ratio if ratio is None else float(ratio)
    head_tokens = len(compressor.bos)
    documents = compressor.tokenize(texts)
    longest = compressor.plan.longest(ratio)
    cuts: list[list[tuple[int, int]]] = []
    for document in documents:
        lengths = random_segments(len(document), config.train_segments, longest, rng)
        # Nobody reads the last segment's summary.
        slots = [compressor.plan.slots(n, ratio) for n in lengths[:-1]] + [0] * bool(lengths)
        cuts.append(list(zip(lengths, slots)))
        compressor.plan.check_room(cuts[-1], ratio)
    soft = [compressor.no_slots() for _ in documents]
    before: list[Tensor | None] = [None] * len(documents)  # the state that predicts a segment's first token
    starts = [0] * len(documents)
    states: list[Tensor] = []
    targets: list[int] = []
    for step in range(max(map(len, cuts), default=0)):
        who = [i for i, cut in enumerate(cuts) if step < len(cut)]
        pieces = [documents[i][starts[i] : starts[i] + cuts[i][step][0]] for i in who]
        slots = [cuts[i][step][1] for i in who]
        prompts = [soft[i] for i in who]
        rows = compressor.read(reader.model, prompts, pieces, slots if compressor.reads_itself else [0] * len(who))
        for i, row, piece in zip(who, rows, pieces):
            first = head_tokens + len(soft[i])
            own = row[first : first + len(piece)]
            opening = before[i] if step else row[head_tokens - 1 : head_tokens] if head_tokens else None
            states.append(own[:-1] if opening is None else torch.cat([opening, own[:-1]]))
            targets += piece if opening is not None else piece[1:]
            before[i] = own[-1:]
            starts[i] += len(piece)
        if not compressor.reads_itself and any(slots):
            rows = compressor.read(compressor.lm, prompts, pieces, slots)
        for i, row, n in zip(who, rows, slots):
            if n:
                soft[i] = compressor.extend(soft[i], row[-n:])
                if (step + 1) % config.segments_per_substep == 0:
                    soft[i] = soft[i].detach()
    if not targets:
        return compressor.summary.sum() * 0.0, 0
    found = torch.cat(states)
    ids = torch.tensor(targets, device=found.device)
    return LanguageModelingLoss(reader.head)(found, ids, num_items=1), len(targets)
