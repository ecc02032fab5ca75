"""Contexts of which a reader in training sees pooled embeddings and not the tokens.

A compressed passage is a row of vectors, each standing for several tokens. A small reader that has met only tokens makes
little of such a vector. Here some passages of its training rows become slots: runs of neighbouring tokens, each the
normed sum of the embeddings of its rarest tokens, as `SlotMatchingLoss` defines it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ...compressors.objectives.matching import NORM, TOKENS

Slot = list[tuple[int, float]]  # (token, weight)


@dataclass
class PooledText:
    """A context in which passages were pooled.

    Attributes:
        ids: tokens, the padding token where a slot goes. slots: what is summed there, by index in `ids`.
        place: for each token of the whole context where it can be read in `ids`, -1 if its slot leaves it out.
    """

    ids: list[int] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    place: list[int] = field(default_factory=list)

    def add_tokens(self, ids: Sequence[int]) -> None:
        """Append tokens that stay as they are."""
        self.place += range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids

    def add_pooled(self, ids: Sequence[int], window: int, weights: np.ndarray, pad: int) -> None:
        """Append `ids` as ceil(n / window) slots of equally many tokens."""
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
    """float64 [vocabulary]: the square of each token's log inverse document frequency in `texts`."""
    counts, total = np.zeros(tokenizer.get_vocab_size()), 0
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        counts[list(set(encoding.ids))] += 1
        total += 1
    return np.square(np.log(max(1, total) / (1 + counts)).clip(min=0))


def draw_window(windows: Mapping[Any, float], rng: random.Random) -> int:
    """A window, in tokens, by the weights of `windows`."""
    return rng.choices([int(size) for size in windows], list(windows.values()))[0]


def flatten_slots(rows: Sequence[dict[int, Slot]], row_tokens: int) -> dict[str, Tensor]:
    """The slots of a batch as flat tensors: `slot_at` [slots] (row x row_tokens + index); `slot_tokens`, `slot_weights`
    and `slot_of` [summed tokens], the last an index into `slot_at`."""
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
    """`embeds` [rows, tokens, width] with the slots in their places, each of the mean norm of `table`'s rows."""
    summed = table[slot_tokens] * slot_weights[:, None]
    slots = table.new_zeros(len(slot_at), table.shape[1]).index_add(0, slot_of, summed)
    norm = table.detach().norm(dim=-1).mean()
    slots = NORM * norm * torch.nn.functional.normalize(slots, dim=-1)
    flat = embeds.reshape(-1, embeds.shape[-1])
    return flat.index_copy(0, slot_at, slots.to(flat.dtype)).view_as(embeds)
