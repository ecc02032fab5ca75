"""Holds a module without registering it with ``nn.Module``; copies of objects that cannot be pickled."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, ClassVar, NoReturn, Self

from torch import nn


def hide(owner: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute that stays out of ``parameters()``, ``state_dict()``, ``to()`` and ``train()`` of its owner.

    For modules that a compressor or loss uses but does not own, such as the reader.
    """
    object.__setattr__(owner, name, value)


class Unpickled:
    """Mixin of objects that can be copied but not pickled; ``why_unpickled`` is the sentence that says so."""

    why_unpickled: ClassVar[str]

    def __reduce__(self) -> NoReturn:
        raise TypeError(self.why_unpickled)

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = object.__new__(type(self))
        # What is cached may hold functions of the original.
        kept = {n: v for n, v in self.__dict__.items() if not isinstance(getattr(type(self), n, None), cached_property)}
        made.__dict__.update(copy.deepcopy(kept, memo))
        return made
