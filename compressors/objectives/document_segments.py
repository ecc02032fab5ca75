"""Language modelling over the segments of a document, each read after the summaries of those before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..encoders.lora_twin import Untuned
from ..slots.segments import Segment
from .language_modeling import LanguageModelingLoss


def random_segments(length: int, count: int, longest: int, rng: random.Random) -> list[int]:
    """Cuts a document into segments of random lengths (arXiv 2305.14788, section 3.3).

    Every segment has at least ``max(ceil((length - longest) / (count - 1)), 2)`` tokens, which keeps each below ``longest``;
    uniform break points divide the remaining tokens.

    Args:
        length: tokens of the document.
        count: segments wanted. A document too short for them gets fewer, one too long for them more.
        longest: tokens that one segment may have.
        rng: source of the break points.

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
    # No choice is left: segments of at most two tokens, or hardly more tokens than segments.
    size = -(-length // fewest)
    return [min(size, length - start) for start in range(0, length, size)]


def document_segment_losses(
    compressor: Any, texts: Sequence[str], rng: random.Random, ratio: float | None = None
) -> tuple[Tensor, int]:
    """Sum of the token losses over all segments of all documents, and the number of predicted tokens.

    Segments of a document are read in turn, each after the soft prompt of the ones before; the last token of a segment
    predicts the first of the next. Gradients flow through the soft prompt within ``segments_per_substep`` segments. The first
    token of a document is predicted from BOS, if there is one. (The authors' code leaves out the token at each border between
    substeps.) All first segments are read in one pass, then all second ones, and so on. If the reader is not tuned, it reads
    the segments as it is, and the encoder only makes the summaries.

    Args:
        compressor: an `AutoCompressor`.
        texts: the documents.
        rng: source of the segments' lengths.
        ratio: compression ratio; default: the config's.

    Raises:
        ValueError: if a document's summaries and a segment exceed the reader's positions.
    """
    config, reader, front = compressor.config, compressor.reader, compressor.opening
    ratio = compressor.ratio_or_default(ratio)
    documents = []
    for ids in reader.tokenize_batch(texts):
        lengths = random_segments(len(ids), config.train_segments, compressor.longest_segment(ratio), rng)
        # Nothing reads the last segment's summary.
        slots = [compressor.slots_of(n, ratio) for n in lengths[:-1]] + [0] * bool(lengths)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        documents.append([Segment(ids[e - n : e], s, front) for e, n, s in zip(ends, lengths, slots)])
    one_model = reader.model is compressor.encoder.lm
    reads = compressor.encoder if one_model else Untuned(reader.model)
    soft = [compressor.no_slots() for _ in documents]
    before: list[Tensor | None] = [None] * len(documents)  # the state that predicts a segment's first token
    states: list[Tensor] = []
    targets: list[int] = []
    for step in range(max(map(len, documents), default=0)):
        who = [i for i, document in enumerate(documents) if step < len(document)]
        segments = [documents[i][step] for i in who]
        prompts = [soft[i] for i in who]
        bare = segments if one_model else [Segment(s.ids, 0, front) for s in segments]
        rows = compressor.read(reads, prompts, bare)
        for i, row, segment in zip(who, rows, segments):
            first = len(front) + len(soft[i])
            own = row[first : first + len(segment.ids)]
            opening = before[i] if step else row[len(front) - 1 : len(front)] if front else None
            states.append(own[:-1] if opening is None else torch.cat([opening, own[:-1]]))
            targets += segment.ids if opening is not None else segment.ids[1:]
            before[i] = own[-1:]
        if not one_model and any(s.slots for s in segments):
            rows = compressor.read(compressor.encoder, prompts, segments)
        for i, row, segment in zip(who, rows, segments):
            if segment.slots:
                soft[i] = compressor.extend(soft[i], row, segment.slots)
                if (step + 1) % config.segments_per_substep == 0:
                    soft[i] = soft[i].detach()
    if not targets:
        return compressor.summary.sum() * 0.0, 0
    found = torch.cat(states)
    ids = torch.tensor(targets, device=found.device)
    return LanguageModelingLoss(reader.head)(found, ids, num_items=1), len(targets)
