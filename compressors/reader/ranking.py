"""Ranks compressed passages: the reader picks one after the other (PE-RANK), or the nearest mean slots come first (UniICL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.passage import CompressedPassage
from .kv import position_arguments
from .plan import Prompt
from .reader import Reader

TASK = "Below are {n} passages. Rank them by how well they answer the query: {query}\n\n"
ASK = "\nQuery: {query}\nRanking, the most relevant passage first:"


def ranking_prompt(query: str, passages: Sequence[CompressedPassage]) -> list[str | CompressedPassage]:
    """Asks for the order of some passages."""
    prompt: list[str | CompressedPassage] = [TASK.format(n=len(passages), query=query)]
    for number, passage in enumerate(passages, 1):
        prompt += [f"Passage {number}: ", passage, "\n"]
    return [*prompt, ASK.format(query=query)]


def one_slot(passage: CompressedPassage) -> CompressedPassage:
    """The mean of a passage's slots, as a passage of one slot. Raises ``ValueError`` for another interface, or no slots."""
    if passage.embeds is None or not passage.slots:
        raise ValueError(
            f"Ranking needs passages of interface 'embeds' with at least one slot, got {passage.slots} of "
            f"{passage.interface!r}; leave empty passages out, or use a compressor to embeds."
        )
    return replace(passage, embeds=passage.embeds.mean(0, keepdim=True))


def ranking_logits(
    reader: Reader, prompts: Sequence[Prompt], ranked: Sequence[Sequence[CompressedPassage]]
) -> list[Tensor]:
    """Logits ``[n, n]`` per prompt: row t scores all passages after the first t of them were chosen; differentiable.

    Args:
        reader: the reader.
        prompts: from `ranking_prompt`, in any order of the passages.
        ranked: the passages of each prompt, in the order in which they are chosen.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width.
    """
    vectors = [[one_slot(passage) for passage in passages] for passages in ranked]
    plans = reader.plan([[*prompt, *chosen[:-1]] for prompt, chosen in zip(prompts, vectors)])
    reader.check_room(plans, 0)
    hidden = reader.forward(plans, pad_right=True)[0]
    check_rankable(reader, hidden)
    found = []
    for plan, states, chosen in zip(plans, hidden, vectors):
        rows = torch.cat([p.embeds for p in chosen if p.embeds is not None]).to(states)
        found.append(states[len(plan) - len(chosen) : len(plan)] @ rows.T)
    return found


def check_rankable(reader: Reader, hidden: Tensor) -> None:
    """Raises ``ValueError`` if hidden states cannot be compared with slots."""
    if hidden.shape[-1] != reader.width:
        raise ValueError(
            f"Ranking compares hidden states with slots, and those of {reader.name!r} are {hidden.shape[-1]} and "
            f"{reader.width} wide; use another reader."
        )


def rank_passages(
    reader: Reader, query: str, passages: Sequence[CompressedPassage], *, window: int = 20, stride: int = 10
) -> list[int]:
    """Indices of passages, the most relevant first.

    Constrained greedy decoding: the passage whose mean slot has the largest product with the reader's last state comes next,
    and that slot is the next input (PE-RANK, arXiv 2406.14848). More than ``window`` passages are ranked in windows from the
    last to the first, each ``stride`` further on (RankGPT).

    Raises:
        ValueError: for empty passages or other interfaces than embeds, or ``stride`` outside 1..window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1..window, got stride={stride} and window={window}.")
    order = list(range(len(passages)))
    start = max(len(order) - window, 0)
    while order:
        part = order[start : start + window]
        chosen = _rank_window(reader, query, [passages[i] for i in part])
        order[start : start + window] = [part[i] for i in chosen]
        if not start:
            break
        start = max(start - stride, 0)
    return order


@torch.no_grad()
def nearest_passages(query: CompressedPassage, passages: Sequence[CompressedPassage]) -> list[int]:
    """Indices of passages, the nearest first: by the cosine between mean slots (UniICL, arXiv 2405.17062).

    Args:
        query: the question, compressed as a passage is.
        passages: compressed by the same compressor, which was trained with the objective ``contrast``.

    Raises:
        ValueError: for empty passages, an empty question, or other interfaces than embeds.
    """
    asked = one_slot(query).embeds
    found = [torch.cosine_similarity(asked, one_slot(p).embeds.to(asked)).item() for p in passages]  # type: ignore
    return sorted(range(len(found)), key=lambda i: -found[i])


@torch.no_grad()
def _rank_window(reader: Reader, query: str, passages: Sequence[CompressedPassage]) -> list[int]:
    vectors = torch.cat([p.embeds for p in map(one_slot, passages) if p.embeds is not None])
    plans = reader.plan([ranking_prompt(query, passages)])
    reader.check_room(plans, len(passages) - 1)
    hidden, _, cache, _ = reader.forward(plans, use_cache=True)
    check_rankable(reader, hidden)
    decoder, state, at = reader.model.get_decoder(), hidden[0, -1], len(plans[0])
    vectors = vectors.to(state)
    order: list[int] = []
    left = torch.ones(len(passages), dtype=torch.bool, device=state.device)
    while True:
        chosen = int((vectors @ state).masked_fill(~left, float("-inf")).argmax())
        order.append(chosen)
        left[chosen] = False
        if len(order) == len(passages):
            return order
        out = decoder(
            inputs_embeds=vectors[chosen][None, None],
            attention_mask=torch.ones(1, at + 1, dtype=torch.long, device=state.device),
            past_key_values=cache,
            use_cache=True,
            **position_arguments(decoder, torch.tensor([[at]], device=state.device)),
        )
        state, at = out.last_hidden_state[0, -1], at + 1
