"""What training and scoring read: the hidden states from which a reader predicts given target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plan import KV, Prompt

if TYPE_CHECKING:
    from .reader import Reader


@dataclass
class Targets:
    """Hidden states that predict target tokens, row after row.

    Attributes:
        hidden: ``[N, hidden]``, the reader's last hidden state at the position before each target token.
        ids: ``[N]`` the target tokens.
        rows: ``[N]`` the prompt each belongs to.
    """

    hidden: Tensor
    ids: Tensor
    rows: Tensor


def target_hidden(
    reader: Reader,
    prompts: Sequence[Prompt],
    targets: Sequence[str] | Sequence[Sequence[int]],
    *,
    add_eos: bool = False,
    chat: bool = False,
) -> Targets:
    """Hidden states that predict each target's tokens; differentiable in the slots.

    Args:
        reader: what reads.
        prompts: what is read.
        targets: for each prompt, the text that follows (tokenised on its own) or its ids.
        add_eos: close every target with the end-of-sequence token.
        chat: apply the chat template.

    Raises:
        ValueError: if a target is empty, the counts differ, or prompt and target are too long for the model.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"One target a prompt is needed: got {len(prompts)} prompts and {len(targets)} targets.")
    ids = [reader.tokenize(t) if isinstance(t, str) else [int(i) for i in t] for t in targets]
    if add_eos:
        if reader.eos_id is None:
            raise ValueError(f"{reader.name!r} has no end-of-sequence token to close the targets with.")
        ids = [[*t, reader.eos_id] for t in ids]
    if empty := [i for i, t in enumerate(ids) if not t]:
        raise ValueError(f"Targets {empty} are empty; there is nothing to predict.")
    plans = reader.plan(prompts, chat=chat)
    for plan, target in zip(plans, ids):
        if plan.kinds[-1] == KV:
            raise ValueError("A prompt must not end with a KV passage: something must be run to predict what follows.")
        plan.add_tokens(target[:-1])
    reader.check_room(plans, 1)
    right = not any(plan.kv for plan in plans)
    hidden, _, _, _ = reader.forward(plans, pad_right=right)
    ends = [len(plan) if right else hidden.shape[1] for plan in plans]
    counts = torch.tensor([len(t) for t in ids])
    rows = torch.repeat_interleave(torch.arange(len(ids)), counts)
    columns = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, counts.tolist())])
    picked = hidden[rows.to(reader.device), columns.to(reader.device)]
    flat = torch.tensor([i for t in ids for i in t], device=picked.device)
    return Targets(picked, flat, rows.to(picked.device))
