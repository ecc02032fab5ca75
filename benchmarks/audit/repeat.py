"""The reader itself as attacker: it is asked to repeat the passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...compressors import CompressedPassage
from ...recipes.data.templates import autoencoding_prompt
from .attacker import Attacker, Stolen, register_attacker


@register_attacker
class Repeat(Attacker):
    """Asks the reader to repeat what it reads, with the prompt of autoencoding (arXiv 2307.06945). Needs no training."""

    name: ClassVar[str] = "repeat"
    title: ClassVar[str] = "asking the reader"

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return isinstance(stolen, CompressedPassage) and stolen.interface != "text"

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        passages = [one for one in stolen if isinstance(one, CompressedPassage)]
        out = [""] * len(passages)
        order = sorted((i for i, p in enumerate(passages) if p.slots), key=lambda i: passages[i].source_tokens)
        for start in range(0, len(order), 8):  # passages of similar length, so that few write past their end
            which = order[start : start + 8]
            longest = max(passages[i].source_tokens for i in which) + 8
            told = self.reader.generate([autoencoding_prompt(passages[i]) for i in which], longest)
            for i, text in zip(which, told):
                out[i] = text.strip()
        return out
