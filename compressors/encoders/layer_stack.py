"""Encoder made of some layers of the reader, copied and trained whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.hidden import hide
from ..reader.kv import position_arguments
from .lora_twin import Twin, share
from .pooled_queries import layer_list


class LayerStack(Twin):
    """Some layers of a causal LM. They are copied, trained and saved; embeddings and final norm are the model's own.

    Args:
        model: the causal LM, left as it is.
        first, last: the layers ``first`` to ``last - 1`` are used.
        norm: end with the model's final norm.
        bidirectional: every token sees every other one; `forward` then needs a mask without the padding.

    Attributes:
        layers: the copied layers.

    Raises:
        ValueError: if the model has fewer layers.
    """

    def __init__(
        self, model: PreTrainedModel, first: int, last: int, *, norm: bool = True, bidirectional: bool = False
    ) -> None:
        super().__init__()
        lm = share(model)
        body = lm.get_decoder()
        name, layers = layer_list(body)
        if not 0 <= first < last <= len(layers):
            raise ValueError(
                f"The encoder takes layers {first + 1} to {last} of the reader, which has {len(layers)}; choose fewer layers."
            )
        same = {id(config): config for config in (lm.config, body.config)}  # what the layers run by stays one object
        self.layers = copy.deepcopy(nn.ModuleList(list(layers)[first:last]), same).requires_grad_(True)
        setattr(body, name, self.layers)
        config = body.config.get_text_config()
        config.num_hidden_layers = last - first
        if types := getattr(config, "layer_types", None):
            config.layer_types = types[first:last]
        if not norm:
            norms = [name for name, child in body.named_children() if "norm" in type(child).__name__.lower()]
            setattr(body, norms[-1], nn.Identity())
        self.bidirectional = bidirectional
        hide(self, "lm", lm.eval())
        self.train()

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Last hidden states; arguments as for `Twin`."""
        if not self.bidirectional:
            return super().forward(embeds, mask, positions)
        batch, time = embeds.shape[:2]
        if positions is None:
            positions = torch.arange(time, device=embeds.device).expand(batch, -1)
        least = torch.finfo(embeds.dtype).min
        additive = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(~mask.bool(), least)
        additive = additive[:, None, None].expand(-1, 1, time, -1)
        body = self.decoder
        types = set(getattr(body.config.get_text_config(), "layer_types", None) or [])
        given: Any = dict.fromkeys(types, additive) if "sliding_attention" in types else additive
        out = body(inputs_embeds=embeds, attention_mask=given, use_cache=False, **position_arguments(body, positions))
        return out.last_hidden_state
