"""Reads slots as sums of token embeddings, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...compressors import CompressedPassage
from .attacker import Attacker, Stolen, register_attacker


@register_attacker
class SlotWords(Attacker):
    """Orthogonal matching pursuit of each slot over the reader's embedding table.

    Of each slot the token with the largest cosine to what the tokens found so far leave unexplained, as many tokens as a slot
    stands for. Exact for a passage's own embeddings; finds some tokens of pooled windows.
    """

    name: ClassVar[str] = "slot-words"
    title: ClassVar[str] = "nearest embeddings"
    most = 16  # tokens of a slot

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return isinstance(stolen, CompressedPassage) and stolen.interface == "embeds"

    @torch.no_grad()
    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        device = self.reader.device
        table = normalize(self.reader.embed(torch.arange(self.reader.vocab_size, device=device)).float(), dim=-1)
        out = []
        for one in stolen:
            if not isinstance(one, CompressedPassage) or one.embeds is None or not one.slots:
                out.append("")
                continue
            per_slot = max(1, min(self.most, round(one.source_tokens / one.slots)))
            tokens = pursue(one.embeds.float().to(device), table, per_slot)
            if per_slot == 1:
                out.append(self.reader.decode(tokens[:, 0]).strip())
            else:
                out.append(" ".join(self.reader.decode([int(token)]).strip() for token in tokens.flatten()))
        return out


def pursue(slots: Tensor, table: Tensor, count: int) -> Tensor:
    """``[slots, count]`` rows of the table ``[tokens, width]`` (unit length) whose combinations come nearest to each slot."""
    found = torch.zeros(len(slots), 0, dtype=torch.long, device=slots.device)
    rest = slots
    for _ in range(min(count, slots.shape[1])):
        likeness = rest @ table.T
        if found.shape[1]:
            likeness.scatter_(1, found, -torch.inf)
        found = torch.cat([found, likeness.argmax(-1, keepdim=True)], dim=1)
        basis = table[found].mT  # [slots, width, found]
        rest = slots - (basis @ torch.linalg.lstsq(basis, slots[:, :, None]).solution)[..., 0]
    return found
