"""Settings that came to a config after checkpoints with it had been written."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any


def added(default: Any, text: str) -> Any:
    """A field that came later: at its default it is left out of `CompressorConfig.to_dict`.

    So the fingerprint of an older checkpoint, and all that is stored under it, stays what it was.

    Args:
        default: what the method did before there was the setting.
        text: the setting's help.
    """
    return field(default=default, kw_only=True, metadata={"help": text, "added": True})


def written(config: Any) -> list[Field[Any]]:
    """A config's fields that are written down, in the constructor's order: keyword-only ones come last."""
    kept = [f for f in fields(config) if not (f.metadata.get("added") and getattr(config, f.name) == f.default)]
    return sorted(kept, key=lambda f: bool(f.kw_only))
