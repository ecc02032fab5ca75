"""Reads prompts that begin alike, such as the questions about one passage: their common part runs once.

The decoder reads the common parts and keeps their keys and values, differentiable; the rest of each prompt is read after them.
The result equals that of `Reader.target_hidden`. A model that cannot do this (checked on a small example) reads every prompt
whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core.batching import pack, pass_positions
from .kv import position_arguments
from .plan import Layout, Prompt, PromptPlan
from .reader import Reader, Targets

_shares: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by model


def target_hidden(
    reader: Reader,
    prompts: Sequence[Prompt],
    targets: Sequence[Sequence[int]],
    groups: Sequence[Hashable],
    budget: int,
) -> Targets:
    """Hidden states that predict each target's tokens; differentiable in the slots.

    Args:
        reader: the reader.
        prompts: the prompts.
        targets: token ids of each prompt's target, at least one.
        groups: prompts of equal values begin alike: what is common to them is read once.
        budget: positions per forward pass, padding included.

    Raises:
        ValueError: if a prompt and its target are too long for the model.
    """
    plans = reader.plan(prompts)
    # Positions before the one that predicts the first target token, which the rest of a prompt begins with at the latest.
    most = [len(plan) - 1 for plan in plans]
    for plan, target in zip(plans, targets, strict=True):
        plan.add_tokens(target[:-1])
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    able = shares_prefixes(reader) and not any(plan.kv for plan in plans)
    shared = []
    if able:
        shared = [(which, _common(plans, most, which)) for which in members.values() if len(which) > 1]
        shared = [(which, n) for which, n in shared if n]
        if sum(n * (len(which) - 1) for which, n in shared) <= pass_positions(reader.device):
            shared = []  # one more pass would cost more than it saves
    alone = sorted(set(range(len(plans))) - {i for which, _ in shared for i in which})
    found = _read_alone(reader, prompts, targets, alone, [len(plan) for plan in plans], budget)
    if shared:
        reader.check_room(plans, 1)
        found |= _read_shared(reader, plans, shared, [len(t) for t in targets], budget)
    rows = torch.repeat_interleave(torch.arange(len(plans)), torch.tensor([len(t) for t in targets]))
    ids = torch.tensor([i for t in targets for i in t])
    return Targets(torch.cat([found[i] for i in range(len(plans))]), ids.to(reader.device), rows.to(reader.device))


def _common(plans: Sequence[PromptPlan], most: Sequence[int], which: Sequence[int]) -> int:
    """Positions at the start that are the same in the chosen plans, at most `most` of any."""
    first, length = plans[which[0]], min(most[i] for i in which)
    for plan in (plans[i] for i in which[1:]):
        pairs = zip(range(length), first.ids, plan.ids, first.kinds, plan.kinds)
        length = sum(1 for _ in takewhile(lambda pair: pair[1] == pair[2] and pair[3] == pair[4], pairs))
        for (start, one), (other_start, other) in zip(first.soft, plan.soft):
            if start != other_start or one is not other:
                length = min(length, start, other_start)
                break
    # A passage that only begins in the common part is read with the rest.
    return min([length, *(start for start, slots in first.soft if start < length < start + len(slots))])


def _read_alone(
    reader: Reader,
    prompts: Sequence[Prompt],
    targets: Sequence[Sequence[int]],
    which: Sequence[int],
    lengths: Sequence[int],
    budget: int,
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for group in pack([lengths[i] for i in which], budget, pass_positions(reader.device)):
        chosen = [which[g] for g in group]
        hidden = reader.target_hidden([prompts[i] for i in chosen], [targets[i] for i in chosen]).hidden
        found.update(zip(chosen, hidden.split([len(targets[i]) for i in chosen])))
    return found


def _read_shared(
    reader: Reader,
    plans: Sequence[PromptPlan],
    shared: Sequence[tuple[Sequence[int], int]],
    counts: Sequence[int],
    budget: int,
) -> dict[int, Tensor]:
    """Hidden states at the last ``counts`` positions of each plan in ``shared``, whose groups come with their common length."""
    overhead, found = pass_positions(reader.device), {}
    heads = [_cut(plans[which[0]], n) for which, n in shared]
    for part in pack([len(head) for head in heads], budget, overhead):
        keys, valid = prefix_cache(reader, [heads[g] for g in part])
        tails = [(i, row, shared[g][1]) for row, g in enumerate(part) for i in shared[g][0]]
        for rest in pack([len(plans[i]) - n for i, _, n in tails], budget, overhead):
            which, rows, starts = zip(*(tails[t] for t in rest))
            hidden = _read_rests(reader, [plans[i] for i in which], starts, keys, valid, torch.tensor(rows))
            for row, (i, start) in enumerate(zip(which, starts)):
                end = len(plans[i]) - start
                found[i] = hidden[row, end - counts[i] : end]
    return found


def _cut(plan: PromptPlan, n: int) -> PromptPlan:
    """The first ``n`` positions of a plan."""
    return PromptPlan(plan.ids[:n], plan.kinds[:n], [(at, slots) for at, slots in plan.soft if at < n])


def prefix_cache(reader: Reader, heads: Sequence[PromptPlan]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of every layer, and ``[heads, time]`` which positions are real; padded on the left."""
    _, layout, cache, _ = reader.forward(heads, use_cache=True)
    layers: list[Any] = cache.layers  # type: ignore[union-attr]
    return [(layer.keys, layer.values) for layer in layers], layout.valid


def _read_rests(
    reader: Reader,
    plans: Sequence[PromptPlan],
    starts: Sequence[int],
    layers: Sequence[tuple[Tensor, Tensor]],
    valid: Tensor,
    rows: Tensor,
) -> Tensor:
    """Hidden states ``[batch, time, hidden]`` of the plans from ``starts`` on, padded on the right.

    Args:
        reader: the reader.
        plans: what is read.
        starts: how many positions of each are in the cache.
        layers, valid: of `prefix_cache`.
        rows: the row of the cache that belongs to each plan.
    """
    rests = [
        PromptPlan(plan.ids[n:], plan.kinds[n:], [(at - n, slots) for at, slots in plan.soft if at >= n])
        for plan, n in zip(plans, starts)
    ]
    layout = Layout.of(rests, reader.device, reader.dtype, pad_right=True)
    positions = layout.positions + torch.tensor(starts, device=reader.device)[:, None]
    rows = rows.to(reader.device)
    # Nothing attends to padding on the right, as it comes last.
    mask = torch.cat([valid[rows], torch.ones_like(layout.valid)], dim=1).long()
    decoder = reader.model.get_decoder()
    out = decoder(
        inputs_embeds=layout.splice(reader.embed),
        attention_mask=mask,
        past_key_values=DynamicCache([(k[rows], v[rows]) for k, v in layers]),
        use_cache=True,
        **position_arguments(decoder, positions),
    )
    return out.last_hidden_state


def shares_prefixes(reader: Reader) -> bool:
    """Whether prompts read after the keys and values of their common part give what they give when read whole."""
    model = reader.model
    if getattr(model.get_decoder(), "training", False):  # its gradients are checkpointed, which drops the cache
        return False
    if model not in _shares:
        _shares[model] = _check(reader)
    return _shares[model]


@torch.no_grad()
def _check(reader: Reader) -> bool:
    plans = []
    for length, first in ((9, 3), (8, 5)):
        plans.append(PromptPlan())
        plans[-1].add_tokens(i % reader.vocab_size for i in [*range(7, 12), *range(first, first + length)])
    other = PromptPlan()
    other.add_tokens(i % reader.vocab_size for i in range(2, 9))
    with torch.autocast(reader.device.type, enabled=False):
        try:
            keys, valid = prefix_cache(reader, [_cut(plans[0], 5), _cut(other, 3)])
            rests = _read_rests(reader, [*plans, other], [5, 5, 3], keys, valid, torch.tensor([0, 0, 1]))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        for plan, start, rest in zip([*plans, other], (5, 5, 3), rests):
            whole = reader.forward([plan], pad_right=True)[0][0, start:]
            tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(whole.dtype, 5e-2)
            if not torch.allclose(rest[: len(whole)], whole, atol=tolerance * float(whole.abs().max()), rtol=0):
                return False
    return True
