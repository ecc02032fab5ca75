"""Encoder that is a smaller causal LM with its own tokenizer, trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from ..core.errors import CheckpointError
from ..reader.loading import load_tokenizer, save_tokenizer
from ..reader.quiet import quiet_loading
from ..reader.tokenization import PromptTokenizer
from .lora_twin import Twin

ENCODER_FOLDER = "encoder"  # in a compressor's folder: config and tokenizer of its encoder


class SmallLMEncoder(Twin):
    """Body (no head) of a causal LM and its tokenizer; all its weights are trained and saved.

    Args:
        body: a Hugging Face model that takes ``inputs_embeds`` and returns ``last_hidden_state``.
        tokenizer: its (fast) tokenizer.

    Attributes:
        prompts: the tokenizer, as `Reader` uses its own.
    """

    def __init__(self, body: Any, tokenizer: Any) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(True)
        self.prompts = PromptTokenizer(tokenizer, self.vocab_size)
        self.train()

    @classmethod
    def from_pretrained(cls, name: str | Path) -> SmallLMEncoder:
        """Loads a model from its id or folder, in float32 for training.

        Raises:
            ValueError: if nothing of that name can be loaded.
        """
        try:
            with quiet_loading():  # transformers reports the unused head
                body = AutoModel.from_pretrained(str(name), dtype=torch.float32)
            return cls(body, load_tokenizer(str(name)))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"The encoder {str(name)!r} cannot be loaded: {error}.") from error

    @classmethod
    def from_description(cls, folder: Path) -> SmallLMEncoder:
        """Builds a model of random weights from a folder written by `save_description`; the compressor loads the weights."""
        try:
            config = AutoConfig.from_pretrained(str(folder))
            return cls(AutoModel.from_config(config), load_tokenizer(str(folder)))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder} describes no encoder: {error}") from error

    def save_description(self, folder: Path) -> None:
        """Writes config and tokenizer, without the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        self.body.config.save_pretrained(folder)
        save_tokenizer(self.prompts.tokenizer, folder)

    @property
    def decoder(self) -> Any:
        """The model that computes hidden states."""
        return self.body

    @property
    def vocab_size(self) -> int:
        """Number of its embeddings."""
        return self.body.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Positions that one pass can take."""
        return getattr(self.body.config.get_text_config(), "max_position_embeddings", None)

    def embed(self, ids: Tensor) -> Tensor:
        """``[...]`` ids to ``[..., width]`` embeddings."""
        return self.body.get_input_embeddings()(ids)
