"""Stored text needs no attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...compressors import CompressedPassage
from .attacker import Attacker, Stolen, register_attacker


@register_attacker
class KeptText(Attacker):
    """Reads the text that a text method keeps."""

    name: ClassVar[str] = "kept-text"
    title: ClassVar[str] = "reading it"

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return isinstance(stolen, CompressedPassage) and stolen.interface == "text"

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        return [one.text or "" for one in stolen if isinstance(one, CompressedPassage)]
