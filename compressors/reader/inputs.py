"""What a causal LM runs on for planned prompts: embeddings, positions, masks, and the keys and values of passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from .attention import Prefix, attending
from .kv import join, position_arguments
from .plan import KV, Layout, PromptPlan


def run_decoder(
    reader: Any,
    plans: Sequence[PromptPlan],
    *,
    drop_last: bool = False,
    use_cache: bool = False,
    pad_right: bool = False,
) -> tuple[Tensor, Layout, DynamicCache | None, Tensor | None]:
    """Runs the decoder, without the head, over planned prompts.

    Args:
        reader: the `Reader` whose model runs.
        plans: the prompts.
        drop_last: leave out each prompt's last position, which ``model.generate`` feeds itself.
        use_cache: keep the keys and values.
        pad_right: pad on the right, which needs no attention mask and is faster; not with KV passages.

    Returns:
        Last hidden states ``[batch, time, hidden]``, the layout, the cache, and the KV slots' positions.
    """
    has_kv = any(plan.kv for plan in plans)
    if pad_right and (has_kv or drop_last or use_cache):
        raise ValueError("pad_right needs whole prompts without KV passages and cache.")
    layout = Layout.of(plans, reader.device, reader.dtype, pad_right=pad_right)
    inputs: dict[str, Any] = {}
    cache = kv_positions = None
    if has_kv:
        reader.kv_placement.check_length(max(map(len, plans)))
    door = _kv_door(reader, plans, layout)
    if has_kv and door is None:
        cache, kv_positions = join(reader.kv_placement, plans, reader.dtype, reader.device)
        inputs["attention_mask"] = reader.kv_placement.mask(kv_positions, layout, reader.dtype)
    else:
        inputs["attention_mask"] = torch.ones_like(layout.ids) if pad_right else layout.valid.long()
        cache = DynamicCache() if use_cache else None
    embeds, positions = layout.splice(reader.embed), layout.positions
    if drop_last:
        embeds, positions = embeds[:, :-1], positions[:, :-1]
        mask = inputs["attention_mask"]
        crop = (lambda m: m[:, :, :-1, :-1]) if kv_positions is not None else (lambda m: m[:, :-1])
        inputs["attention_mask"] = {k: crop(m) for k, m in mask.items()} if isinstance(mask, dict) else crop(mask)
        if not embeds.shape[1]:  # each prompt has one position besides its KV slots
            return embeds, layout, cache, kv_positions
    decoder = reader.model.get_decoder()
    with attending(reader.model, door):
        out = decoder(
            inputs_embeds=embeds,
            past_key_values=cache,
            use_cache=cache is not None,
            **inputs,
            **position_arguments(decoder, positions),
        )
    return out.last_hidden_state, layout, cache, kv_positions


def _kv_door(reader: Any, plans: Sequence[PromptPlan], layout: Layout) -> Prefix | None:
    """The KV passages of a batch, for `attending`; ``None`` if the model's own cache can hold them all."""
    if not any(plan.ragged for plan in plans):
        return None
    return Prefix(reader.kv_placement, plans, layout.positions)


def generation_inputs(
    reader: Any, plans: list[PromptPlan], config: GenerationConfig
) -> tuple[dict[str, Any], Prefix | None]:
    """Arguments of ``model.generate``, and the KV passages that its cache cannot hold."""
    if any(plan.kv for plan in plans):
        for plan in plans:
            check_last(plan)
        reader.kv_placement.check_length(max(map(len, plans)) + int(config.max_new_tokens or 0))
        if not any(plan.ragged for plan in plans):
            return _kv_generation_inputs(reader, plans, config), None
    layout = Layout.of(plans, reader.device, reader.dtype)
    mask = layout.valid.long()
    door = _kv_door(reader, plans, layout)
    if layout.soft is None and door is None:
        ids = layout.ids.masked_fill(~layout.valid, int(config.pad_token_id))  # type: ignore[arg-type]
        return {"input_ids": ids, "attention_mask": mask}, None
    inputs: dict[str, Any] = {"inputs_embeds": layout.splice(reader.embed), "attention_mask": mask}
    if door is not None:
        inputs["position_ids"] = layout.positions
        # Made from the config, the cache would keep a window only of a sliding layer.
        inputs["past_key_values"] = DynamicCache()
    return inputs, door


def _kv_generation_inputs(reader: Any, plans: list[PromptPlan], config: GenerationConfig) -> dict[str, Any]:
    # All but the last position run here, under a mask in logical order, which generate does not take. generate feeds
    # the last position and continues from it: it sees every slot and token, so a flat mask is enough.
    _, layout, cache, kv_at = run_decoder(reader, plans, drop_last=True, use_cache=True)
    kv_positions: Any = kv_at
    kv_valid: Tensor = kv_positions >= 0
    mask = torch.cat([kv_valid, layout.valid], dim=1).long()
    embeds = layout.splice(reader.embed)
    dummies = embeds.new_zeros(embeds.shape[0], kv_valid.shape[1], embeds.shape[2])  # generate counts the cache in
    positions = torch.cat([kv_positions.clamp(min=0), layout.positions], dim=1)
    if (config.num_beams or 1) > 1:
        cache.batch_repeat_interleave(config.num_beams)  # type: ignore[union-attr]
    return {
        "inputs_embeds": torch.cat([dummies, embeds], dim=1),
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
    }


def check_last(plan: PromptPlan) -> None:
    """Raises ``ValueError`` if a prompt ends with a KV passage."""
    if plan.kinds[-1] == KV:
        raise ValueError("A prompt must not end with a KV passage: add the text that asks for an answer after it.")
