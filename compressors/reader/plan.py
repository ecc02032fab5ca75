"""The planner: lays a prompt out as logical positions, each a token, a soft slot or a KV slot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.passage import CompressedPassage
from .tokenization import PromptTokenizer, Special, TokenIds

Prompt = Any  # a str, or a sequence of str and CompressedPassage in reading order
TOKEN, SOFT, KV = 0, 1, 2


@dataclass
class PromptPlan:
    """The layout of a prompt: position ``i`` is token ``ids[i]`` if ``kinds[i]`` is ``TOKEN``, else a slot.

    Attributes:
        ids: token ids, 0 at slots.
        kinds: ``TOKEN``, ``SOFT`` or ``KV`` per logical position.
        soft: ``(first position, embeds [slots, width])`` of each soft passage, in order.
        kv: ``(first position, passage)`` of each KV passage, in order.
    """

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    soft: list[tuple[int, Tensor]] = field(default_factory=list)
    kv: list[tuple[int, CompressedPassage]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ragged(self) -> bool:
        """Whether a KV passage differs from head to head."""
        return any(passage.ragged for _, passage in self.kv)

    @property
    def run(self) -> int:
        """Positions that the model runs: all but KV slots."""
        return len(self.kinds) - self.kinds.count(KV)

    def add_tokens(self, ids: Iterable[int]) -> None:
        """Appends tokens."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.kinds.extend([TOKEN] * (len(self.ids) - before))

    def add_passage(self, passage: CompressedPassage) -> None:
        """Appends the slots of a soft or KV passage, and before them the tokens that are read again."""
        if passage.info.get("takes_positions") is False:
            raise ValueError("Slots without positions (AutoCompressor on OPT) are no longer supported; compress again.")
        if passage.interface == "embeds":
            self.soft.append((len(self.ids), passage.embeds))  # type: ignore[arg-type]
        else:
            self.add_tokens(passage.first)
            self.kv.append((len(self.ids), passage))
        slots = passage.places - len(passage.first)
        self.ids.extend([0] * slots)
        self.kinds.extend([SOFT if passage.interface == "embeds" else KV] * slots)


def reading_order(plans: Sequence[PromptPlan]) -> list[int]:
    """Indices of plans in the order in which `Reader.generate` reads them: by the positions that run."""
    return sorted(range(len(plans)), key=lambda i: (plans[i].run, len(plans[i])))


def merge_atoms(atoms: Iterable[Any]) -> list[Any]:
    """Joins adjacent texts, including text passages, so that they are tokenised as one; drops passages without slots."""
    merged: list[Any] = []
    for atom in atoms:
        if isinstance(atom, CompressedPassage):
            if atom.interface == "text":
                atom = atom.text
            elif atom.slots == 0:
                continue
        if not isinstance(atom, str | CompressedPassage | Special | TokenIds):
            raise TypeError(
                f"A prompt holds strings and compressed passages, got {type(atom).__name__}; "
                "a batch is a list of prompts, each of them a list."
            )
        if isinstance(atom, str):
            if not atom:
                continue
            if merged and isinstance(merged[-1], str):
                merged[-1] += atom
                continue
        merged.append(atom)
    return merged


def plan_prompts(batch: Sequence[Sequence[Any]], tokenizer: PromptTokenizer, bos: Sequence[bool]) -> list[PromptPlan]:
    """Lays out prompts given as atoms; ``bos``: which of them start with the tokenizer's special tokens."""
    merged = [merge_atoms(atoms) for atoms in batch]
    runs = [(atom, i == 0) for atoms in merged for i, atom in enumerate(atoms) if isinstance(atom, str)]
    encoded = iter(tokenizer.encode_batch(runs) if runs else [])
    plans = []
    for atoms, opens in zip(merged, bos):
        plan = PromptPlan()
        if opens and not (atoms and isinstance(atoms[0], TokenIds)):
            plan.add_tokens(tokenizer.bos_ids)
        for atom in atoms:
            if isinstance(atom, str):
                plan.add_tokens(next(encoded))
            elif isinstance(atom, Special):
                plan.add_tokens([atom.id])
            elif isinstance(atom, TokenIds):
                plan.add_tokens(atom.ids)
            else:
                plan.add_passage(atom)
        plans.append(plan)
    return plans


@dataclass
class Layout:
    """A batch of plans as padded tensors of the positions that the model runs, without KV slots.

    Attributes:
        ids: ``[batch, time]`` token ids, 0 at slots and padding.
        valid: ``[batch, time]`` bool.
        positions: ``[batch, time]`` logical positions, 0 at padding.
        soft_index: ``[slots]`` flat index of every soft slot into ``batch x time``, in the order of ``soft``.
        soft: ``[slots, width]`` or ``None``.
    """

    ids: Tensor
    valid: Tensor
    positions: Tensor
    soft_index: Tensor
    soft: Tensor | None

    @classmethod
    def of(
        cls, plans: Sequence[PromptPlan], device: torch.device, dtype: torch.dtype, *, pad_right: bool = False
    ) -> Layout:
        """Lays out a batch on a device, padded on the left by default; casts soft slots to `dtype`."""
        run_at = [[p for p, kind in enumerate(plan.kinds) if kind != KV] if plan.kv else None for plan in plans]
        lengths = [len(plan) if at is None else len(at) for plan, at in zip(plans, run_at)]
        time = max(lengths, default=0)
        ids = torch.zeros(len(plans), time, dtype=torch.long)
        valid = torch.zeros(len(plans), time, dtype=torch.bool)
        positions = torch.zeros(len(plans), time, dtype=torch.long)
        index: list[Tensor] = []
        soft: list[Tensor] = []
        for row, (plan, at, n) in enumerate(zip(plans, run_at, lengths)):
            if not n:
                continue
            where = torch.arange(n) if at is None else torch.tensor(at)
            begin = 0 if pad_right else time - n
            ids[row, begin : begin + n] = torch.tensor(plan.ids)[where]
            valid[row, begin : begin + n] = True
            positions[row, begin : begin + n] = where
            column = {p: c for c, p in enumerate(at)} if at is not None else None
            for start, embeds in plan.soft:
                first = begin + (start if column is None else column[start])
                index.append(torch.arange(embeds.shape[0]) + row * time + first)
                soft.append(embeds.to(device=device, dtype=dtype))
        return cls(
            ids.to(device),
            valid.to(device),
            positions.to(device),
            (torch.cat(index) if index else torch.zeros(0, dtype=torch.long)).to(device),
            torch.cat(soft) if soft else None,
        )

    def splice(self, embed: Any) -> Tensor:
        """Embeddings ``[batch, time, width]`` of tokens and soft slots, differentiable in the slots."""
        embeds = embed(self.ids)
        if self.soft is None:
            return embeds
        flat = embeds.flatten(0, 1).index_put((self.soft_index,), self.soft)
        return flat.view_as(embeds)
