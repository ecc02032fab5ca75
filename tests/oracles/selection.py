"""Plain computations to test token selection against: losses, forwarded positions, LLMLingua's released loop."""

from __future__ import annotations

import math
import random

import torch
from nutgraf import Reader

FACTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe.",
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth.",
]
ODD = [
    "我爱北京天安门。你好吗？" * 6,
    "👩‍👩‍👧 🦊🏽 🇫🇷🇩🇪 é́ ok " * 12,
    "a\ud800b lone \udfff halves. " * 5,
    "x" * 500,
    " \n\t " * 30,
]


def passage(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(" ".join(FACTS).split()) for _ in range(words))


class Forwarded:
    """Counts the positions that a model's body reads, padding apart and included."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.positions = self.padded = 0
        self.handle = module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(kwargs["input_ids"]) if mask is None else mask
        self.positions += int(mask.sum())
        self.padded += mask.numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


def losses_of(reader: Reader, ids: list[int]) -> list[float]:
    """Entry i: the loss of the token after token i."""
    with torch.no_grad():
        logits = reader.model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return (-logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).tolist()


def by_hand(reader: Reader, ids: list[int], ratio: float, size: int, start: int = 0) -> list[int]:
    """The published loop over one text behind a prefix of ``start`` tokens: windows of ``size``, the first one shorter."""
    alive = list(range(len(ids)))
    behind: dict[int, float] = {}
    alone: dict[int, float] = {}
    begin, measured, first = start, 0, True
    while begin + size <= len(alive):
        upto = len(alive) if first else begin + size
        found = losses_of(reader, [ids[i] for i in alive[:upto]])
        behind.update({alive[k]: found[k] for k in range(measured, upto - 1)})
        if start:
            found = losses_of(reader, [ids[i] for i in alive[start:upto]])
            alone.update({alive[start + k]: found[k] for k in range(max(measured - start, 0), upto - start - 1)})
        measured = 0 if first and start else begin
        score = {i: (alone[i] - behind[i] if start else behind[i]) for i in alive[start:-1]}
        ranked = sorted(score.values(), reverse=True)
        limit = ranked[max(0, min(len(ranked) - 1, int(len(ranked) * ratio) - 1))] if ratio < 1 else -math.inf
        window = alive[begin : begin + (size - 1 if first else size)]
        kept = [i for i in window if score.get(i, math.inf) > limit]
        alive[begin : begin + len(window)] = kept
        begin, first = begin + len(kept), False
    return alive[start:]
