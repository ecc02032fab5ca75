"""Maps objective names to their classes, and says what data an objective needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import Tensor

from ..base import SoftCompressor
from ..core.passage import CompressedPassage
from .teacher import TeacherLogits

# What a training item offers to an objective. The first four are texts that the reader predicts after reading slots: the
# answer to a question, what follows the passage, a restatement of it, the passage itself. With "slots" nothing is read and
# the slots themselves are scored; "triple" is a question, its passage and another one, all compressed; "ranking" is a question
# and passages, the most relevant first; with "document" the method gets whole documents.
Target = Literal["answer", "continuation", "paraphrase", "passage", "slots", "triple", "ranking", "document"]
UNREAD: frozenset[Target] = frozenset({"slots", "triple", "ranking", "document"})


@dataclass(frozen=True)
class Setup:
    """What objectives are made from.

    Attributes:
        compressor: the compressor in training.
        temperature, top_k, reverse: settings of distillation.
        draw: ``draw(name, n)`` returns n passages of the training data, the same ones for the same name.
    """

    compressor: SoftCompressor
    temperature: float = 1.0
    top_k: int | None = None
    reverse: float = 0.0
    draw: Callable[[str, int], list[str]] = lambda name, n: []


@dataclass(frozen=True)
class Scored:
    """The part of a batch that an objective scores.

    Attributes:
        targets: target ids of each item.
        hidden, ids: ``[N, d]`` hidden states that predict the target tokens, and these ``[N]``; None for `UNREAD` targets.
        teacher: the reader's predictions with the passages as text, if the objective asks for a teacher.
        blind: ``[N, d]`` the reader's hidden states without the passages, if the objective asks for them.
        passages: compressed passages, differentiable, for objectives on `UNREAD` targets.
        sizes: how many of the passages belong to each item, in order.
        questions: the question of each item, for objectives on ``ranking``.
    """

    targets: Sequence[Sequence[int]]
    hidden: Any = None
    ids: Any = None
    teacher: Tensor | TeacherLogits | None = None
    blind: Tensor | None = None
    passages: Sequence[CompressedPassage] = ()
    sizes: Sequence[int] = ()
    questions: Sequence[str] = ()


class Objective:
    """A term of the training loss, registered under the name that recipes use.

    Class attributes:
        targets: training targets that it is taken on.
        teacher: whether it needs the predictions of the reader that reads the passages as text.
        blind: whether it needs those of the reader without the passages.
        trains: whether it has parameters of its own, which train with the compressor and are thrown away afterwards.
    """

    targets: ClassVar[frozenset[Target]]
    teacher: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    @classmethod
    def create(cls, setup: Setup) -> Self:
        """Makes the objective for a stage of training."""
        raise NotImplementedError

    def total(self, scored: Scored) -> Tensor:
        """Sum of the loss over the target tokens, a differentiable scalar."""
        raise NotImplementedError


OBJECTIVES: dict[str, type[Objective]] = {}
T = TypeVar("T", bound=type[Objective])


def register_objective(name: str) -> Callable[[T], T]:
    """Class decorator that registers an objective. Raises ``ValueError`` if the name is taken by another class."""

    def register(cls: T) -> T:
        if name in OBJECTIVES and OBJECTIVES[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"The objective name {name!r} is already taken by {OBJECTIVES[name].__name__}.")
        OBJECTIVES[name] = cls
        return cls

    return register


def targets_of(name: str) -> frozenset[Target]:
    """Targets of an objective. Objectives of a method (`SoftCompressor.own_objectives`) take whole documents."""
    return OBJECTIVES[name].targets if name in OBJECTIVES else frozenset({"document"})


def needs_teacher(names: Sequence[str]) -> bool:
    """Whether any of the objectives compares with a teacher."""
    return any(name in OBJECTIVES and OBJECTIVES[name].teacher for name in names)
