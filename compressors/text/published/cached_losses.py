"""Next-token losses of a row that changes at its end while its front stays: the front is kept as keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...reader.kv import position_arguments
from ...reader.reader import Reader
from ..scoring import token_losses


class CachedLosses:
    """Reads a row of tokens piece by piece, none of them twice as long as it stays in the cache.

    A token's position is the number of tokens in the cache before it when it is read; what is dropped later from the middle
    leaves the positions of the rest as they were.

    Args:
        scorer: the causal LM.
    """

    def __init__(self, scorer: Reader) -> None:
        self.scorer = scorer
        self._decoder: nn.Module = scorer.model.get_decoder()  # type: ignore[assignment]
        self._cache = DynamicCache()

    def __len__(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Reads a row that begins with the tokens of the cache, to its last token but one.

        Args:
            ids: ``[tokens]``, the whole row.

        Returns:
            ``[tokens - cached - 1]`` losses, float32 on the CPU: entry i is that of token ``cached + i + 1``.
        """
        device, known = self.scorer.device, len(self)
        new = ids[known:-1]
        if not len(new):
            return torch.zeros(0)
        positions = torch.arange(known, known + len(new), device=device)[None]
        hidden = self._decoder(
            input_ids=new[None].to(device),
            past_key_values=self._cache,
            use_cache=True,
            **position_arguments(self._decoder, positions),
        ).last_hidden_state[0]
        return token_losses(self.scorer, hidden, ids[known + 1 :].to(device)).cpu()

    def cut(self, length: int) -> None:
        """Keeps the first ``length`` tokens."""
        self._keep(slice(0, length), slice(0, 0))

    def drop(self, start: int, number: int) -> None:
        """Lets ``number`` tokens go from ``start`` on."""
        self._keep(slice(0, start), slice(start + number, None))

    def _keep(self, front: slice, back: slice) -> None:
        layers: list[Any] = self._cache.layers
        self._cache = DynamicCache()
        for i, layer in enumerate(layers):
            keys, values = (torch.cat([t[..., front, :], t[..., back, :]], -2) for t in (layer.keys, layer.values))
            if keys.shape[-2]:
                self._cache.update(keys, values, i)
