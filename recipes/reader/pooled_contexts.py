"""Pooled contexts: some passages of a reader's training rows become slots.

A small reader that was trained only on tokens reads compressed passages poorly. A slot here is the normalised sum of the
embeddings of the rarest tokens in a run of tokens, as `SlotMatchingLoss` defines it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ...compressors.objectives.matching import NORM, TOKENS

Slot = list[tuple[int, float]]  # (token, weight)


@dataclass
class PooledText:
    """A context with pooled passages.

    Attributes:
        ids: tokens, with the padding token at slots. slots: their tokens and weights, by index in `ids`.
        place: for each token of the original context its index in `ids`, or -1 if its slot omits it.
    """

    ids: list[int] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    place: list[int] = field(default_factory=list)

    def add_tokens(self, ids: Sequence[int]) -> None:
        """Appends tokens."""
        self.place += range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids

    def add_pooled(self, ids: Sequence[int], window: int, weights: np.ndarray, pad: int) -> None:
        """Appends `ids` as ceil(n / window) slots of about equal size."""
        count = -(-len(ids) // window)
        for i in range(count):
            run = ids[len(ids) * i // count : len(ids) * (i + 1) // count]
            kept = sorted(set(run), key=lambda token: (-weights[token], token))[:TOKENS]
            at = len(self.ids)
            silent = not any(weights[token] > 0 for token in kept)
            self.slots[at] = [(token, 1.0 if silent else float(weights[token])) for token in kept]
            self.place += [at if token in kept else -1 for token in run]
            self.ids.append(pad)


def token_weights(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """float64 [vocabulary]: squared inverse document frequency of each token in `texts`."""
    counts, total = np.zeros(tokenizer.get_vocab_size()), 0
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        counts[list(set(encoding.ids))] += 1
        total += 1
    return np.square(np.log(max(1, total) / (1 + counts)).clip(min=0))


def draw_window(windows: Mapping[int, float], rng: random.Random) -> int:
    """Draws a window size in tokens."""
    return rng.choices(list(windows), list(windows.values()))[0]


def flatten_slots(rows: Sequence[dict[int, Slot]], row_tokens: int) -> dict[str, Tensor]:
    """Slots of a batch as flat tensors: `slot_at` [slots] (row x row_tokens + index); `slot_tokens`, `slot_weights` and
    `slot_of` (index into `slot_at`) [summed tokens]."""
    slots = [(row * row_tokens + at, slot) for row, found in enumerate(rows) for at, slot in found.items()]
    return {
        "slot_at": torch.tensor([at for at, _ in slots], dtype=torch.long),
        "slot_tokens": torch.tensor([token for _, slot in slots for token, _ in slot], dtype=torch.long),
        "slot_weights": torch.tensor([weight for _, slot in slots for _, weight in slot], dtype=torch.float32),
        "slot_of": torch.tensor([i for i, (_, slot) in enumerate(slots) for _ in slot], dtype=torch.long),
    }


def put_slots(
    embeds: Tensor, table: Tensor, slot_at: Tensor, slot_tokens: Tensor, slot_weights: Tensor, slot_of: Tensor
) -> Tensor:
    """`embeds` [rows, tokens, width] with slots inserted, each with the mean norm of `table`'s rows."""
    summed = table[slot_tokens] * slot_weights[:, None]
    slots = table.new_zeros(len(slot_at), table.shape[1]).index_add(0, slot_of, summed)
    norm = table.detach().norm(dim=-1).mean()
    slots = NORM * norm * torch.nn.functional.normalize(slots, dim=-1)
    flat = embeds.reshape(-1, embeds.shape[-1])
    return flat.index_copy(0, slot_at, slots.to(flat.dtype)).view_as(embeds)
