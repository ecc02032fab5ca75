"""A model's output head as a function of hidden states, to compute logits only where needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def build_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Returns the function from last hidden states to logits, verified against the model's own logits.

    Raises:
        ValueError: if the model transforms its logits in an unknown way.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    output = model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        if scale != 1.0:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    ids = torch.arange(1, 6, device=model.get_input_embeddings().weight.device)[None] % config.vocab_size
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = head(model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    if not bool(torch.isfinite(wanted).all()):
        raise ValueError(f"{type(model).__name__} gives NaN or infinite logits: its weights are damaged.")
    if not torch.allclose(got.float(), wanted.float(), atol=1e-3 * float(wanted.float().abs().max()) + 1e-4):
        raise ValueError(
            f"{type(model).__name__} transforms its logits in an unknown way (largest difference "
            f"{float((got - wanted).abs().max()):.3g}); please report this architecture."
        )
    return head
