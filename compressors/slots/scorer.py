"""Scores tokens by the reader's early states, and picks the best tokens of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.hidden import hide
from ..encoders.lora_twin import Untuned, share
from ..encoders.pooled_queries import cut_layers, layer_list
from ..reader.reader import Reader
from .pooling import token_states
from .segments import Segment


class TokenScorer(nn.Module):
    """Two linear layers with ReLU between over the states after the reader's first layers, which stay frozen (Nugget).

    States are brought to unit mean square first.

    Args:
        reader: the reader.
        layers: how many of its layers run.
        start: the first scores are near this value.

    Raises:
        ValueError: if the reader has fewer layers.
    """

    _reader: Reader
    _body: Untuned

    def __init__(self, reader: Reader, layers: int, start: float = 0.0) -> None:
        super().__init__()
        model = share(reader.model)
        count = len(layer_list(model.get_decoder())[1])
        if not 2 <= layers <= count:
            raise ValueError(
                f"The scorer reads states after layer {layers}, and {reader.name!r} has {count} layers; set scorer_layers to "
                f"2 to {count}."
            )
        cut_layers(model.get_decoder(), count - layers)
        hide(self, "_reader", reader)
        hide(self, "_body", Untuned(model))
        width = self._states([Segment([0], 0, [])], 1)[0].shape[1]
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.constant_(self.second.bias, start)
        self.to(reader.device)

    def forward(self, segments: Sequence[Segment], budget: int) -> list[Tensor]:
        """``[tokens]`` scores per segment, with at most ``budget`` positions per pass of the layers."""
        found, dtype = self._states(segments, budget), self.first.weight.dtype
        states = torch.cat(found).to(torch.promote_types(dtype, torch.float32))
        states = F.rms_norm(states, states.shape[-1:], eps=1e-6).to(dtype)
        scores: Tensor = self.second(F.relu(self.first(states)))[:, 0]
        return list(scores.split([len(part) for part in found]))

    @torch.no_grad()
    def _states(self, segments: Sequence[Segment], budget: int) -> list[Tensor]:
        return token_states(self._body, segments, self._reader.embed, self._reader.device, budget)


def best_tokens(scores: Tensor, slots: int, first: int = 0, last: int = 0) -> Tensor:
    """``[slots]`` indices of the tokens with the highest scores, in order; the ``first`` and ``last`` ones take precedence."""
    ranked = scores.detach().clone()
    ranked[:first] = torch.inf
    ranked[len(ranked) - last :] = torch.inf
    return ranked.argsort(descending=True, stable=True)[:slots].sort().values
