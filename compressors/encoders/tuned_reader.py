"""A reader that is tuned together with its compressor."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..core.fingerprint import hash_json, hash_tensors
from ..reader.reader import Reader
from .lora_twin import Twin


class AdaptedReader(Reader):
    """Reads with a twin's weights; the base reader stays as it is.

    Compressed passages of a compressor that tunes the reader are for ``compressor.reader`` only:
    ``compressor.reader.generate([[passage, question]])``. ``compressor.reader.save_pretrained(folder)`` writes a plain model
    with the tuned weights, for a server.

    Args:
        base: the reader that the twin was made from.
        twin: its `LoRATwin` or `FullTwin`.

    Attributes:
        base: the reader before tuning.
    """

    def __init__(self, base: Reader, twin: Twin) -> None:
        super().__init__(twin.lm, base.tokenizer, name=f"{base.name} (adapted)")
        twin.requires_grad_(True)  # super() freezes the model; the compressor trains these
        self.base = base
        self._twin = twin
        self._hashed: tuple[tuple[int, ...], str] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the base reader and the tuned weights, or a placeholder during training, to save hashing at every step."""
        if self._twin.training and torch.is_grad_enabled():
            return "training"
        state = dict(self._twin.named_parameters())
        versions = tuple(n for t in state.values() for n in (t.data_ptr(), t._version))
        if self._hashed is None or self._hashed[0] != versions:
            self._hashed = (versions, hash_json("adapted", self.base.fingerprint, hash_tensors(state.items())))
        return self._hashed[1]

    def plain_model(self) -> PreTrainedModel:
        """A copy of the tuned model with LoRA added to the weights, rounded to their dtype once."""
        return self._twin.merged()
