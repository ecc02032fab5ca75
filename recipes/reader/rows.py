"""Training rows of the small reader: groups of (context, questions) packed into rows of equal length.

Item i of a stage depends only on (seed, stage name, i). Within a group every question sees only the context and itself, at
its own positions, so one pass over a passage trains many answers, each computed exactly as at inference.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ...compressors.reader.tokenization import PromptTokenizer, Special
from ..data.templates import SEPARATOR, UNANSWERABLE
from .corpus import ReaderCorpus
from .groups import FORMATS, Branch, Group, GroupMaker, RowSettings
from .pooled_contexts import PooledText, Slot, draw_window, flatten_slots
from .tokenizer import SPECIALS

LOSS_KINDS = ("answer", "text", "copy", "first")  # first: the token an answer begins with
MAX_POINTERS = 160
IGNORED = 0  # kind of a position without loss; kinds count from 1 in the order of LOSS_KINDS


@dataclass(frozen=True)
class _ChatFrame:
    """Tokens of the chat template before a user's message and after it.

    `opens_line`: the template ends with white space, so the answer starts without a space.
    """

    before: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    opens_line: bool = False


class ReaderRows(Dataset):
    """Map-style rows of a stage. `rows[i]` is a dict of int64 arrays [row_tokens]:

    ids; positions (restart with every group; branches continue from the context); groups (0: padding); branches (0: context);
    kinds (0: no loss, else 1 + index in LOSS_KINDS) of the loss on predicting this token. `pointers` [MAX_POINTERS, 2] are
    pairs (index of a prompt's last token, index of a context token that begins its answer), padded with -1. `slots` are the
    pooled runs of tokens by index (see `pooled_contexts`).

    Args:
        weights: [vocabulary] token weights in a pooled run; needed if `settings.pooled` is not 0.
    """

    def __init__(
        self,
        corpus: ReaderCorpus,
        tokenizer: PreTrainedTokenizerFast,
        settings: RowSettings,
        seed: str,
        rows: int,
        weights: np.ndarray | None = None,
    ) -> None:
        if settings.pooled and weights is None:
            raise ValueError("Rows with mix.pooled need the weights of the tokens; see pooled_contexts.token_weights.")
        self.weights = np.zeros(0) if weights is None else weights
        self.maker = GroupMaker(corpus, settings)
        self.tokenizer, self.settings, self.seed, self.rows = tokenizer, settings, seed, rows
        self.core: Any = tokenizer.backend_tokenizer
        self.prompts = PromptTokenizer(tokenizer)
        self.chat = self._chat_frame() if any(FORMATS[name].chat for name in settings.formats) else _ChatFrame()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.rows:
            raise IndexError(f"Row {index} of a stage of {self.rows} rows.")
        rng = random.Random(f"{self.seed}/{index}")
        row = _Row(self.settings.row_tokens, self.tokenizer.pad_token_id)
        misses = 0
        while misses < 3 and row.left > 24:
            group = self.maker.make(rng)
            pieces = self._copy_pieces(rng, row.left) if group is None else self._encode(group, rng)
            misses += not row.add(*pieces)
        return row.arrays()

    def _chat_frame(self) -> _ChatFrame:
        here = object()
        atoms = self.prompts.render_chat([{"role": "user", "content": [here]}])
        at = next(i for i, atom in enumerate(atoms) if atom is here)
        before, behind = (
            [i for atom in part for i in ([atom.id] if isinstance(atom, Special) else self._ids(atom))]
            for part in (atoms[:at], atoms[at + 1 :])
        )
        return _ChatFrame(before, behind, isinstance(atoms[-1], str) and atoms[-1][-1:].isspace())

    def _ids(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def _encode(self, group: Group, rng: random.Random) -> tuple[Tokens, list[Tokens]]:
        """Token ids and loss kinds of a group's context and branches."""
        head = list(self.chat.before if group.format.chat else self.prompts.bos_ids)
        head += self._ids(group.format.head) if group.context else []
        kind = LOSS_KINDS.index(group.context_kind) + 1 if group.context_kind else IGNORED
        share = self.settings.text_share if group.branches else 1.0
        if self.settings.pooled and self._can_pool(group) and rng.random() < self.settings.pooled:
            return self._encode_pooled(group, head, rng)
        body = self._ids(group.context)
        context = Tokens(head + body, [0] * len(head) + [kind if rng.random() < share else 0 for _ in body])
        return context, [self._branch(branch, group, context.ids) for branch in group.branches]

    def _branch(self, branch: Branch, group: Group, context: list[int]) -> Tokens:
        """Tokens of a branch, with the places of its answer in `context`."""
        prompt = self._ids(branch.prompt) + (self.chat.behind if group.format.chat else [])
        text = branch.answer.lstrip() if group.format.chat and self.chat.opens_line else branch.answer
        answer = [*self._ids(text), self.tokenizer.eos_token_id]
        places = find_places(context, answer[:-1]) if branch.kind == "answer" else []
        kinds = [0] * len(prompt) + [LOSS_KINDS.index(branch.kind) + 1] * len(answer)
        if branch.kind == "answer":
            kinds[len(prompt)] = LOSS_KINDS.index("first") + 1
        return Tokens(prompt + answer, kinds, len(prompt) - 1, places)

    @staticmethod
    def _can_pool(group: Group) -> bool:
        return bool(group.context) and any(branch.kind == "answer" for branch in group.branches)

    def _encode_pooled(self, group: Group, head: list[int], rng: random.Random) -> tuple[Tokens, list[Tokens]]:
        """The group with pooled passages (in one of five groups only some), without questions whose answer begins with an
        omitted token."""
        pooled, whole = PooledText(), list(head)
        pooled.add_tokens(head)
        window, some = draw_window(self.settings.pool_windows, rng), rng.random() < 0.2
        for number, passage in enumerate(group.context.split(SEPARATOR)):
            between, ids = self._ids(SEPARATOR) if number else [], self._ids(passage)
            pooled.add_tokens(between)
            whole += between + ids
            if some and rng.random() < 0.5:
                pooled.add_tokens(ids)
            else:
                pooled.add_pooled(ids, window, self.weights, self.tokenizer.pad_token_id)
        branches = []
        for branch in group.branches:
            tokens = self._branch(branch, group, whole)
            tokens.places = sorted({pooled.place[i] for i in tokens.places} - {-1})
            if tokens.places or branch.kind != "answer" or branch.answer == UNANSWERABLE:
                branches.append(tokens)
        return Tokens(pooled.ids, [0] * len(pooled.ids), slots=pooled.slots), branches

    def _copy_pieces(self, rng: random.Random, left: int) -> tuple[Tokens, list[Tokens]]:
        """A random segment repeated two to four times; no loss on the first copy."""
        settings, first = self.settings, len(SPECIALS)
        alphabet = range(first, first + min(settings.copy_tokens, len(self.tokenizer) - first))
        span = rng.randint(*settings.copy_span)
        segment = rng.choices(alphabet, k=span)
        ids = (segment * rng.randint(2, 4))[: min(left, settings.row_tokens)]
        return Tokens(ids, [0 if i <= span else LOSS_KINDS.index("copy") + 1 for i in range(len(ids))]), []


@dataclass
class Tokens:
    """Token ids and their loss kinds; for a branch, its prompt's last token and the context places of its answer; for a
    context, its slots by index."""

    ids: list[int]
    kinds: list[int]
    prompt_end: int = 0
    places: list[int] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)


def find_places(context: list[int], answer: list[int], least: int = 3) -> list[int]:
    """Indices in `context` where the answer's first `least` tokens occur."""
    wanted = answer[:least]
    size = len(wanted)
    return [i for i, token in enumerate(context) if wanted and token == wanted[0] and context[i : i + size] == wanted]


class _Row:
    """A row that is filled group by group."""

    def __init__(self, length: int, pad: int) -> None:
        self.ids = np.full(length, pad, dtype=np.int64)
        self.positions, self.groups, self.branches, self.kinds = (np.zeros(length, dtype=np.int64) for _ in range(4))
        self.pointers: list[tuple[int, int]] = []
        self.slots: dict[int, Slot] = {}
        self.used = self.group = 0

    @property
    def left(self) -> int:
        return len(self.ids) - self.used

    def add(self, context: Tokens, branches: list[Tokens]) -> bool:
        """Adds a group with as many branches as fit; returns False if none fits."""
        room = self.left - len(context.ids)
        kept = []
        for branch in branches:
            if len(branch.ids) <= room:
                kept.append(branch)
                room -= len(branch.ids)
        if room < 0 and not branches and any(context.kinds):  # plain text may be cut at the end of the row
            context, room = Tokens(context.ids[: self.left], context.kinds[: self.left]), 0
        if room < 0 or not (kept or any(context.kinds)) or (branches and not kept):
            return False
        self.group += 1
        begin = self.used
        self.slots.update({begin + at: slot for at, slot in context.slots.items()})
        self._put(context, 0, 0)
        for number, branch in enumerate(kept, 1):
            self.pointers += [(self.used + branch.prompt_end, begin + place) for place in branch.places]
            self._put(branch, number, len(context.ids))
        return True

    def _put(self, tokens: Tokens, branch: int, start: int) -> None:
        size = len(tokens.ids)
        where = slice(self.used, self.used + size)
        self.ids[where], self.kinds[where] = tokens.ids, tokens.kinds
        self.positions[where] = np.arange(start, start + size)
        self.groups[where], self.branches[where] = self.group, branch
        self.used += size

    def arrays(self) -> dict[str, Any]:
        kinds = self.kinds
        kinds[0] = 0
        pointers = np.full((MAX_POINTERS, 2), -1, dtype=np.int64)
        if chosen := self.pointers[:MAX_POINTERS]:
            pointers[: len(chosen)] = chosen
        return {
            "ids": self.ids,
            "positions": self.positions,
            "groups": self.groups,
            "branches": self.branches,
            "kinds": kinds,
            "pointers": pointers,
            **({"slots": self.slots} if self.slots else {}),
        }


def collate_rows(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stacks rows into int64 tensors; adds the tensors of `flatten_slots` if there are slots."""
    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0] if key != "slots"}
    slots = [item.get("slots", {}) for item in items]
    return batch | (flatten_slots(slots, batch["ids"].shape[1]) if any(slots) else {})
