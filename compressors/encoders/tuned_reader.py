"""A reader that was tuned together with its compressor: the base reader plus LoRA, or a full copy of it."""

from __future__ import annotations

import torch

from ..core.fingerprint import hash_json, hash_tensors
from ..reader.reader import Reader
from .lora_twin import Twin


class AdaptedReader(Reader):
    """Reads with a twin's weights; the base reader beside it stays as it is.

    A compressor that tunes the reader too gives it as ``compressor.reader``, and its compressed passages are for that
    reader alone: ``compressor.reader.generate([[passage, question]])``.

    Args:
        base: the reader the twin was made of.
        twin: its `LoRATwin` or `FullTwin`.

    Attributes:
        base: the reader as it was.
    """

    def __init__(self, base: Reader, twin: Twin) -> None:
        super().__init__(twin.lm, base.tokenizer, name=f"{base.name} (adapted)")
        twin.requires_grad_(True)  # the twin's parameters are its compressor's to train
        self.base = base
        self._twin = twin
        self._hashed: tuple[tuple[int, ...], str] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the base reader and of what was tuned; while it is being trained, a placeholder."""
        if self._twin.training and torch.is_grad_enabled():
            return "training"  # the weights change with every step, and hashing them each time would be waste
        state = dict(self._twin.named_parameters())
        versions = tuple(n for t in state.values() for n in (t.data_ptr(), t._version))
        if self._hashed is None or self._hashed[0] != versions:
            self._hashed = (versions, hash_json("adapted", self.base.fingerprint, hash_tensors(state.items())))
        return self._hashed[1]
