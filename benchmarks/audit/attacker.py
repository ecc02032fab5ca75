"""The contract of attackers, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from torch import Tensor

from ...compressors import CompressedPassage, Reader
from ..rows import Row

Stolen = CompressedPassage | Tensor  # a stored passage, or its retrieval vectors ``[shards, width]``


class Attacker(ABC):
    """Turns what is stored back into text. It knows the reader's weights, and public text of the same kind.

    Attributes:
        name: of the attacker, in rows and on the command line.
        title: in tables.
        reader: the reader that the passages were compressed for.
        about: what rows say of the attacker.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.about: Row = {}

    @classmethod
    @abstractmethod
    def reads(cls, stolen: Stolen) -> bool:
        """Whether the attacker applies to what is stored."""

    def learn(self, texts: Sequence[str]) -> None:  # noqa: B027 (most attackers have nothing to learn)
        """Learn from public text, before the first attack."""

    @abstractmethod
    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """One reconstruction per stored passage."""


ATTACKERS: dict[str, type[Attacker]] = {}
AttackerT = TypeVar("AttackerT", bound=type[Attacker])


def register_attacker(cls: AttackerT) -> AttackerT:
    """Class decorator: makes an attacker available under its `name`."""
    ATTACKERS[cls.name] = cls
    return cls
