"""The contract of attackers, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from ...compressors import Reader
from ..rows import Row
from .targets import Stolen, Target


class Attacker(ABC):
    """Turns what is stored back into text. It knows the reader's weights, and public text of the same kind.

    Attributes:
        name: of the attacker, in rows and on the command line.
        title: in tables.
        reader: the reader that the passages were compressed for.
        about: what rows say of the attacker.
        of_one_target: whether what it has learned holds for one target only.
        of_one_defence: whether it learns again for each defence.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    of_one_target: ClassVar[bool] = False
    of_one_defence: ClassVar[bool] = False

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.about: Row = {}

    @classmethod
    @abstractmethod
    def reads(cls, stolen: Stolen) -> bool:
        """Whether the attacker applies to what is stored."""

    def learn(self, texts: Sequence[str], target: Target | None = None) -> None:  # noqa: B027 (most have nothing to learn)
        """Learn from public text, before the first attack; `target` says how to compress it."""

    @abstractmethod
    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """One reconstruction per stored passage."""


__all__ = ["ATTACKERS", "Attacker", "Stolen", "register_attacker"]

ATTACKERS: dict[str, type[Attacker]] = {}
AttackerT = TypeVar("AttackerT", bound=type[Attacker])


def register_attacker(cls: AttackerT) -> AttackerT:
    """Class decorator: makes an attacker available under its `name`."""
    ATTACKERS[cls.name] = cls
    return cls
