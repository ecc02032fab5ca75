"""The reader in training: packed rows, losses at chosen positions, and pointing heads."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from ...compressors.reader.head import build_head
from ...compressors.reader.kv import position_arguments
from .pooled_contexts import put_slots
from .rows import LOSS_KINDS


class PackedReader(nn.Module):
    """A causal LM on packed rows: block attention, and the head only at positions with a loss.

    `forward` takes int64 tensors `ids, positions, groups, branches, kinds, pointers` (see `ReaderRows`) and, with pooled
    contexts, the tensors of `flatten_slots`. It returns `loss` (mean over the positions with a loss, weighted by kind),
    `tokens` (without padding) and the unweighted means `loss/<kind>`.

    With `point_weight` above 0, the first head of each of the first `point_groups` key-value groups in the last two layers is
    supervised: `loss/point` is minus the log of its attention, at the end of a prompt, on the context tokens that begin the
    answer. This teaches finding answers much sooner than their likelihood alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self._head = build_head(model)
        self.weights = dict.fromkeys(LOSS_KINDS, 1.0)
        self.point_weight = 0.0
        self.point_groups = 1
        self._inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        layers = getattr(self.model.get_decoder(), "layers", ())
        for index in range(max(0, len(layers) - 2), len(layers)):
            if (attention := getattr(layers[index], "self_attn", None)) is not None:
                attention.register_forward_pre_hook(partial(self._keep, index), with_kwargs=True)

    def _keep(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.training and self.point_weight > 0:
            self._inputs[index] = (kwargs["hidden_states"], kwargs["position_embeddings"])

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        groups: Tensor,
        branches: Tensor,
        kinds: Tensor,
        pointers: Tensor,
        **slots: Tensor,
    ) -> dict[str, Tensor]:
        mask = block_mask(groups, branches)
        decoder, table = self.model.get_decoder(), self.model.get_input_embeddings()
        embeds = table(ids)
        if slots:
            embeds = put_slots(embeds, table.weight, **slots)
        where = position_arguments(decoder, positions)
        hidden = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **where).last_hidden_state
        wanted = kinds[:, 1:] > 0
        targets, kind = ids[:, 1:][wanted], kinds[:, 1:][wanted] - 1
        logits = self._head(hidden[:, :-1][wanted])
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        weight = torch.tensor([self.weights[name] for name in LOSS_KINDS], device=losses.device)[kind]
        loss = (losses * weight).sum() / weight.sum().clamp(min=1e-6)
        out = {"loss": loss, "tokens": (groups > 0).sum()}
        for index, name in enumerate(LOSS_KINDS):
            if (chosen := kind == index).any():
                out[f"loss/{name}"] = losses.detach()[chosen].mean()
        if self._inputs and (pointers[..., 0] >= 0).any():
            heads = [(layer, group) for layer in self._inputs for group in range(self.point_groups)]
            point = torch.stack([self._point_loss(layer, group, mask, pointers) for layer, group in heads]).mean()
            out["loss"], out["loss/point"] = loss + self.point_weight * point, point.detach()
        self._inputs.clear()
        return out

    def _point_loss(self, layer: int, group: int, mask: Tensor, pointers: Tensor) -> Tensor:
        """Mean over prompts of -log(attention of the group's first head on the answer's places)."""
        config: Any = self.model.config
        attention: Any = self.model.model.layers[layer].self_attn
        size, heads = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        hidden, (cos, sin) = self._inputs[layer]
        rows, which = torch.nonzero(pointers[..., 0] >= 0, as_tuple=True)
        ends, places = pointers[rows, which].unbind(-1)
        prompts, number = torch.unique(rows * mask.shape[-1] + ends, return_inverse=True)
        rows, ends = prompts // mask.shape[-1], prompts % mask.shape[-1]
        query = F.linear(hidden[rows, ends], attention.q_proj.weight[group * heads * size :][:size]).float()
        key = F.linear(hidden, attention.k_proj.weight[group * size :][:size]).float()
        query = query * cos[rows, ends].float() + rotate_half(query) * sin[rows, ends].float()
        key = key * cos.float() + rotate_half(key) * sin.float()
        scores = torch.einsum("nd,ntd->nt", query, key[rows]) / math.sqrt(size) + mask[rows, 0, ends]
        gold = torch.zeros_like(scores, dtype=torch.bool).index_put_((number, places), torch.tensor(True))
        shares = F.log_softmax(scores, -1).masked_fill(~gold, -torch.inf)
        return -torch.logsumexp(shares, -1).mean()


def block_mask(groups: Tensor, branches: Tensor) -> Tensor:
    """Additive float mask [rows, 1, tokens, tokens]: a token sees earlier tokens of its group in the context or its own
    branch; padding (group 0) sees padding."""
    tokens = groups.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=groups.device).tril()
    same = groups[:, :, None] == groups[:, None, :]
    visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    allowed = (causal & same & visible)[:, None]
    return torch.zeros(allowed.shape, device=groups.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)
