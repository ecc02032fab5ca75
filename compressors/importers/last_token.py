"""The embedder of xRAG's code: the last hidden state at the last token, not normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from ..core.batching import pad_rows
from ..encoders.embedder import Embedder
from ..reader.loading import load_tokenizer


class LastTokenModel(nn.Module):
    """A transformer as an embedder: the last hidden state, after the final norm, at each text's last token.

    Implements what `Embedder` needs of a sentence-transformers model; neither normalises nor adds a prompt.
    """

    def __init__(self, body: Any, tokenizer: Any) -> None:
        super().__init__()
        self.body = body
        self.tokenizer = tokenizer
        self.max_seq_length = getattr(body.config, "max_position_embeddings", None) or tokenizer.model_max_length

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.body])

    @property
    def device(self) -> torch.device:
        """Its device."""
        return torch.device(next(self.body.parameters()).device)

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return int(self.body.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32, **_: Any) -> Tensor:
        """Vectors ``[texts, dim]``; includes the tokenizer's special tokens."""
        rows, device = [], self.device
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        for start in range(0, len(ids), batch_size):
            padded, mask = pad_rows(ids[start : start + batch_size], 0)
            hidden = self.body(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
            rows.append(hidden[torch.arange(len(padded)), mask.sum(-1) - 1])
        return torch.cat(rows)


def load_last_token_embedder(name: Any, device: Any = None) -> Embedder:
    """Loads a model as a `LastTokenModel`.

    Args:
        name: a Hugging Face model's id or folder.
        device: device to run on; default: the CPU.

    Raises:
        ValueError: if nothing of that name can be loaded.
    """
    if isinstance(name, Embedder):
        return name
    try:
        body = AutoModel.from_pretrained(str(name), dtype="auto").to(device or "cpu")
        tokenizer = load_tokenizer(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The embedder {name!r} cannot be loaded: {error}. Give a Hugging Face id or folder."
        ) from error
    return Embedder(LastTokenModel(body, tokenizer), str(name))  # type: ignore[arg-type]
