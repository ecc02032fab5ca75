"""Runs a decoder's layers in both directions; in the last one, queries pooled over runs of tokens attend to all tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reader.kv import layer_list, position_arguments


def cut_layers(body: nn.Module, dropped: int) -> None:
    """Takes a decoder's last layers and its final norm away, in place.

    Raises:
        ValueError: if fewer than two layers are left.
    """
    name, layers = layer_list(body)
    if len(layers) - dropped < 2:
        raise ValueError(
            f"Without {dropped} of its {len(layers)} layers the encoder has fewer than 2; set dropped_layers."
        )
    setattr(body, name, nn.ModuleList(list(layers)[: len(layers) - dropped]))
    norms = [name for name, child in body.named_children() if "norm" in type(child).__name__.lower()]
    setattr(body, norms[-1], nn.Identity())


class PooledQueries:
    """The layers of a decoder that `cut_layers` has cut, without a causal mask (ARC-Encoder, arXiv 2510.20535).

    All layers but the last run over the tokens. The last one gets the means of runs of their states. Each mean attends, as a
    query at its place among the means, to the states of all tokens at theirs.

    Raises:
        ValueError: if the model changes embeddings before its first layer (learned positions, a scale).
    """

    def __init__(self, body: Any) -> None:
        self.body = body
        _, layers = layer_list(body)
        self.head, self.tail = (_with_layers(body, part) for part in (list(layers)[:-1], list(layers)[-1:]))
        sample = torch.randn(1, 2, *body.get_input_embeddings().weight.shape[1:]).to(next(body.parameters()))
        with torch.no_grad():
            same = self._run(
                _with_layers(body, []), sample, torch.ones(1, 2, 2, dtype=torch.bool, device=sample.device)
            )
        if same.shape != sample.shape or not torch.equal(same, sample):
            raise ValueError(
                f"{type(body).__name__} changes embeddings before its first layer (learned positions or a scale), so its last "
                "layer cannot run on its own; use another method with this model."
            )

    def __call__(self, embeds: Tensor, lengths: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Hidden states after the last layer, without a norm.

        Args:
            embeds: ``[batch, time, width]``, padded on the right.
            lengths: tokens of each row.
            slots: runs of each row. Their lengths differ by at most one, the longer ones first.

        Returns:
            ``[batch, most slots, hidden]``.
        """
        device, (batch, time) = embeds.device, embeds.shape[:2]
        most = max(slots)
        real = torch.arange(time, device=device) < torch.tensor(lengths, device=device)[:, None]
        states = self._run(self.head, embeds, real[:, None].expand(-1, time, -1))
        weights = torch.stack([_mean_weights(n, k, time, most) for n, k in zip(lengths, slots)]).to(states)
        both = torch.cat([states, weights @ states], dim=1)
        seen = torch.cat([real, real.new_zeros(batch, most)], dim=1)  # keys are the tokens
        return self._run(self.tail, both, seen[:, None].expand(-1, time + most, -1), time)[:, time:]

    @staticmethod
    def _run(part: Any, embeds: Tensor, seen: Tensor, time: int | None = None) -> Tensor:
        """A part's output; ``seen`` is ``[batch, rows, keys]``, and positions start again after ``time`` rows."""
        rows = embeds.shape[1]
        positions = torch.arange(rows, device=embeds.device)
        positions = positions % time if time else positions
        mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device)
        mask = mask.masked_fill(~seen, torch.finfo(embeds.dtype).min)[:, None]
        types = set(getattr(part.config.get_text_config(), "layer_types", None) or [])
        out = part(
            inputs_embeds=embeds,
            attention_mask=dict.fromkeys(types, mask) if "sliding_attention" in types else mask,
            use_cache=False,
            **position_arguments(part, positions.expand(len(embeds), -1)),
        )
        return out.last_hidden_state


def _with_layers(body: Any, layers: Sequence[nn.Module]) -> Any:
    """A copy of a decoder that runs some of its layers and shares all its modules."""
    name, all_layers = layer_list(body)
    shared = [*body.children(), *body.parameters(recurse=False), *body.buffers(recurse=False)]
    part = copy.deepcopy(body, {id(item): item for item in shared})
    setattr(part, name, nn.ModuleList(layers))
    config = part.config.get_text_config()
    config.num_hidden_layers = len(layers)
    if types := getattr(config, "layer_types", None):
        which = [list(all_layers).index(layer) for layer in layers]
        config.layer_types = [types[i] for i in which] or types[:1]
    return part


def _mean_weights(length: int, slots: int, time: int, most: int) -> Tensor:
    """``[most, time]``: row k averages run k."""
    base, longer = divmod(length, max(slots, 1))
    runs = torch.tensor([base + (k < longer) for k in range(slots)])
    owner = torch.full((time,), -1)
    owner[:length] = torch.repeat_interleave(torch.arange(slots), runs)
    hit = (owner == torch.arange(most)[:, None]).float()
    return hit / hit.sum(1, keepdim=True).clamp(min=1)
