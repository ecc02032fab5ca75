"""Holds a module without registering it with ``nn.Module``."""

from __future__ import annotations

from typing import Any

from torch import nn


def hide(owner: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute that stays out of ``parameters()``, ``state_dict()``, ``to()`` and ``train()`` of its owner.

    For modules that a compressor or loss uses but does not own, such as the reader.
    """
    object.__setattr__(owner, name, value)
