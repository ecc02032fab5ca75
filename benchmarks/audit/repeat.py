"""The reader itself as attacker: it is asked to repeat the passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from ...compressors import CompressedPassage, Compressor
from ...recipes.data.templates import autoencoding_prompt
from .attacker import Attacker, Stolen, register_attacker
from .targets import Target


@register_attacker
class Repeat(Attacker):
    """Asks the reader to repeat what it reads, with the prompt of autoencoding (arXiv 2307.06945). Needs no training.

    A reader that was tuned with the compressor is part of it, and is the one that is asked.
    """

    name: ClassVar[str] = "repeat"
    title: ClassVar[str] = "asking the reader"
    of_one_target: ClassVar[bool] = True

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return isinstance(stolen, CompressedPassage) and stolen.interface != "text"

    def learn(self, texts: Sequence[str], target: Target | None = None) -> None:
        """Take the reader of the target's compressor, if that is at hand."""
        if target is not None and isinstance(target.victim, Compressor):
            self.reader = target.victim.reader

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        mark = self.reader.fingerprint
        passages = [replace(one, reader=mark) for one in stolen if isinstance(one, CompressedPassage)]
        out = [""] * len(passages)
        order = sorted((i for i, p in enumerate(passages) if p.slots), key=lambda i: passages[i].source_tokens)
        for start in range(0, len(order), 16):  # passages of similar length, so that few write past their end
            which = order[start : start + 16]
            longest = max(passages[i].source_tokens for i in which) + 8
            told = self.reader.generate([autoencoding_prompt(passages[i]) for i in which], longest)
            for i, text in zip(which, told):
                out[i] = text.strip()
        return out
