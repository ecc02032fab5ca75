"""Training rows of the small reader: groups of (context, questions) packed into rows of one length.

Item i of a stage depends only on (seed, stage name, i). A row holds a few groups; within a group every question sees
the context and itself only, at the positions it would have alone, so that one pass over a passage pays for many
answers and each is computed exactly as at inference.
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

from .pooled_contexts import PooledText, Slot, draw_window, flatten_slots
from .questions import answer_kind, make_questions, rename
from .reader_corpus import ReaderCorpus, cut, window
from .reader_prompts import FORMATS, JOIN, NO_CONTEXT, REPEAT, UNANSWERABLE, Branch, Group, refine_prompt
from .tokenizer import SPECIALS

LOSS_KINDS = ("answer", "text", "copy", "first")  # first: the token an answer begins with
MAX_POINTERS = 160
IGNORED = 0  # kind of a position without loss; kinds count from 1 in the order of LOSS_KINDS


@dataclass(frozen=True)
class RowSettings:
    """What a stage's rows are made of.

    Attributes:
        row_tokens: tokens in a row.
        kinds: share of the kinds of groups, by count: copy, text, made, human, many (several passages), none, refine, repeat.
        formats: share of prompt formats. questions: at most so many questions a passage.
        swap: share of passages in which answers are renamed. unanswerable: share of questions of another passage.
        copy_tokens, copy_span: distinct tokens in random copying, and (least, most) tokens of a repeated segment.
        text_share: share of a context's tokens that carry the text loss. max_chars: longest passage, in characters.
        passages: (least, most) passages of a `many` group.
        windows: cut long passages to sentences from anywhere in them, and not to their beginning.
        pooled: share of contexts with pooled passages (`pooled_contexts`). pool_windows: weights of the numbers of tokens
            that one slot stands for (keys as text too: so they stand in a recipe that was written and read again).
    """

    row_tokens: int = 384
    kinds: dict[str, float] = field(default_factory=lambda: {"copy": 1.0})
    formats: dict[str, float] = field(default_factory=lambda: {"plain": 1.0})
    questions: int = 8
    swap: float = 0.3
    unanswerable: float = 0.04
    copy_tokens: int = 256
    copy_span: tuple[int, int] = (5, 14)
    text_share: float = 0.25
    max_chars: int = 900
    passages: tuple[int, int] = (2, 4)
    windows: bool = False
    pooled: float = 0.0
    pool_windows: dict[int | str, float] = field(default_factory=lambda: {4: 1.0})

    def __post_init__(self) -> None:
        makers = {name[5:] for name in dir(GroupMaker) if name.startswith("make_")}
        if unknown := set(self.kinds) - makers:
            raise ValueError(f"mix.kinds names {sorted(unknown)}; the kinds of rows are {sorted(makers)}.")
        if unknown := set(self.formats) - set(FORMATS):
            raise ValueError(f"mix.formats names {sorted(unknown)}; the prompt formats are {sorted(FORMATS)}.")
        if self.row_tokens < 32:
            raise ValueError(f"mix.row_tokens is {self.row_tokens}; a row needs at least 32 tokens.")
        if min(map(int, self.pool_windows), default=0) < 1:
            raise ValueError(
                f"mix.pool_windows is {self.pool_windows}; it takes numbers of tokens from 1 with weights."
            )


class GroupMaker:
    """Draws groups from a corpus; every method `make_KIND(rng)` is one kind of the mix."""

    def __init__(self, corpus: ReaderCorpus, settings: RowSettings) -> None:
        self.corpus, self.settings = corpus, settings

    def make(self, rng: random.Random) -> Group | None:
        """A group of a kind drawn from the mix; None asks for a row of random copying instead."""
        kind = rng.choices(list(self.settings.kinds), list(self.settings.kinds.values()))[0]
        return getattr(self, f"make_{kind}")(rng)

    def make_copy(self, rng: random.Random) -> None:
        """Random copying has no text: `ReaderRows` makes it from token ids."""

    def make_text(self, rng: random.Random) -> Group:
        """Plain text, two paragraphs of an article."""
        return Group(JOIN.join(self.corpus.article(rng)[:3])[: 2 * self.settings.max_chars], context_kind="text")

    def make_repeat(self, rng: random.Random) -> Group:
        """Repeat the passage, word for word."""
        passage = self.corpus.paragraph(rng, rng.choice([150, 250, 400]))
        return Group(passage, [Branch(REPEAT, passage, "copy")], context_kind="text")

    def make_made(self, rng: random.Random) -> Group:
        """A paragraph with rule-made questions."""
        longest = self.settings.max_chars
        if self.settings.windows:
            passage = window(self.corpus.paragraph(rng, 2000), rng.randint(longest // 3, longest), rng)
        else:
            passage = self.corpus.paragraph(rng, rng.choice([250, 500, longest]))
        return self._ask(passage, make_questions(passage, self.settings.questions, rng), rng, "text")

    def make_human(self, rng: random.Random) -> Group:
        """A passage with human questions."""
        asked = self.corpus.human(rng)
        passage, pairs = asked.passage, list(asked.pairs)
        rng.shuffle(pairs)
        if len(passage) > self.settings.max_chars:
            size = self.settings.max_chars
            passage = window(passage, size, rng) if self.settings.windows else cut(passage, size)
            pairs = [pair for pair in pairs if pair[1] in passage]
        pairs = pairs[: self.settings.questions]
        if len(pairs) < 4:
            pairs += make_questions(passage, 2, rng)
        return self._ask(passage, pairs, rng, None)

    def make_many(self, rng: random.Random) -> Group:
        """Several passages joined by a blank line, questions about one or two of them."""
        settings, count = self.settings, rng.randint(*self.settings.passages)
        share = max(200, settings.max_chars // count)
        if self.corpus.many and rng.random() < 0.15:
            record = rng.choice(self.corpus.many)
            others = [text for i, text in enumerate(record.passages) if i != record.gold][: count - 1]
            passages, pairs = [record.passages[record.gold], *others], [(record.question, record.answer)]
        elif rng.random() < 0.65:
            asked = self.corpus.human(rng)
            gold = cut(asked.passage, max(share, 500))
            pairs = [pair for pair in asked.pairs if pair[1] in gold]
            passages = [gold, *(cut(self.corpus.human(rng).passage, share) for _ in range(count - 1))]
        else:
            article = self.corpus.article(rng)
            passages = [cut(text, share) for text in rng.sample(article, min(count, len(article)))]
            pairs = [pair for text in passages for pair in make_questions(text, 2, rng)]
        rng.shuffle(passages)
        rng.shuffle(pairs)
        return self._ask(JOIN.join(passages), pairs[: settings.questions], rng, None)

    def make_none(self, rng: random.Random) -> Group:
        """A question without any context."""
        question, answer = self.corpus.question(rng)
        return Group("", [Branch(NO_CONTEXT.format(question=question), " " + answer)])

    def make_refine(self, rng: random.Random) -> Group:
        """LlamaIndex's refine prompt: a wrong answer with the right passage, or a right answer with another passage."""
        asked = self.corpus.human(rng)
        question, answer = rng.choice(asked.pairs)
        if rng.random() < 0.6:
            existing, context = rng.choice(self.corpus.answers or [answer]), asked.passage
        else:
            existing, context = answer, self.corpus.paragraph(rng, 500)
        prompt = refine_prompt(question, existing, cut(context, self.settings.max_chars))
        return Group("", [Branch(prompt, " " + answer)] if answer in prompt else [])

    def _ask(self, passage: str, pairs: list[tuple[str, str]], rng: random.Random, context_kind: str | None) -> Group:
        """The group of a passage and its questions, some renamed, some unanswerable, in a format drawn at random."""
        settings = self.settings
        texts = [passage, *(text for pair in pairs for text in pair)]
        if pairs and rng.random() < settings.swap:
            for _, old in rng.sample(pairs, min(3, len(pairs))):
                texts = self._swap(texts, old, rng)
        passage, flat = texts[0], texts[1:]
        shape = FORMATS[rng.choices(list(settings.formats), list(settings.formats.values()))[0]]
        branches = []
        for question, answer in zip(flat[::2], flat[1::2], strict=True):
            if rng.random() < settings.unanswerable:
                question, answer = self.corpus.question(rng)[0], UNANSWERABLE
            branches.append(Branch(shape.tail.format(question=question), " " + answer))
        return Group(passage, branches, shape, context_kind)

    def _swap(self, texts: list[str], old: str, rng: random.Random) -> list[str]:
        """Rename `old` to another answer of its kind everywhere, if the new one does not stand there already."""
        kind = answer_kind(old)
        for _ in range(6):
            new = rng.choice(self.corpus.answers or [old])
            if answer_kind(new) == kind and new not in texts[0] and len(new.split()) <= 5:
                return rename(texts, old, new)
        return texts


class ReaderRows(Dataset):
    """Map-style rows of a stage. `rows[i]` is a dict of int64 arrays of shape [row_tokens]:

    ids; positions (restart with every group; branches continue from the context); groups (0 is padding); branches
    (0 is the context); kinds (0 no loss, else 1 + index in LOSS_KINDS): the loss of predicting this token from the
    one before it. `pointers` [MAX_POINTERS, 2] are pairs (index of the last token of a prompt, index of a context
    token with which its answer begins), all places of an answer, -1 where there is no more. `slots` is a dict of the
    places at which a pooled run of tokens is read (see `pooled_contexts`).

    Args:
        weights: [vocabulary] of the tokens in a pooled run; needed if `settings.pooled` is not 0.
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
        self.weights = weights
        self.maker = GroupMaker(corpus, settings)
        self.tokenizer, self.settings, self.seed, self.rows = tokenizer, settings, seed, rows
        self.core = tokenizer.backend_tokenizer
        roles: Any = [tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>")]
        self.user, self.assistant = roles

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

    def _ids(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def _encode(self, group: Group, rng: random.Random) -> tuple[Tokens, list[Tokens]]:
        """Token ids and loss kinds of a group's context and of each of its branches."""
        head = [self.tokenizer.bos_token_id] + ([self.user, *self._ids("\n")] if group.format.chat else [])
        head += self._ids(group.format.head) if group.context else []
        kind = LOSS_KINDS.index(group.context_kind) + 1 if group.context_kind else IGNORED
        share = self.settings.text_share if group.branches else 1.0
        if self.settings.pooled and self._can_pool(group) and rng.random() < self.settings.pooled:
            return self._encode_pooled(group, head, rng)
        body = self._ids(group.context)
        context = Tokens(head + body, [0] * len(head) + [kind if rng.random() < share else 0 for _ in body])
        return context, [self._branch(branch, group, context.ids) for branch in group.branches]

    def _branch(self, branch: Branch, group: Group, context: list[int]) -> Tokens:
        """A branch that reads `context`, in which the places of its answer are looked up."""
        role = [*self._ids("\n"), self.assistant] if group.format.chat else []
        prompt = self._ids(branch.prompt) + role
        answer = [*self._ids(branch.answer), self.tokenizer.eos_token_id]
        places = find_places(context, answer[:-1]) if branch.kind == "answer" else []
        kinds = [0] * len(prompt) + [LOSS_KINDS.index(branch.kind) + 1] * len(answer)
        if branch.kind == "answer":
            kinds[len(prompt)] = LOSS_KINDS.index("first") + 1
        return Tokens(prompt + answer, kinds, len(prompt) - 1, places)

    @staticmethod
    def _can_pool(group: Group) -> bool:
        return bool(group.context) and any(branch.kind == "answer" for branch in group.branches)

    def _encode_pooled(self, group: Group, head: list[int], rng: random.Random) -> tuple[Tokens, list[Tokens]]:
        """The group with its passages pooled, one in five times only some of them; without the questions whose answer
        begins with a token that was left out."""
        if self.weights is None:
            raise ValueError("Rows with mix.pooled need token weights.")
        pooled, whole = PooledText(), list(head)
        pooled.add_tokens(head)
        window, some = draw_window(self.settings.pool_windows, rng), rng.random() < 0.2
        for number, passage in enumerate(group.context.split(JOIN)):
            between, ids = self._ids(JOIN) if number else [], self._ids(passage)
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
            if tokens.places or branch.kind != "answer" or branch.answer.strip() == UNANSWERABLE:
                branches.append(tokens)
        return Tokens(pooled.ids, [0] * len(pooled.ids), slots=pooled.slots), branches

    def _copy_pieces(self, rng: random.Random, left: int) -> tuple[Tokens, list[Tokens]]:
        """A random segment repeated two to four times; its first time carries no loss."""
        settings, first = self.settings, len(SPECIALS)
        alphabet = range(first, first + min(settings.copy_tokens, len(self.tokenizer) - first))
        span = rng.randint(*settings.copy_span)
        segment = rng.choices(alphabet, k=span)
        ids = (segment * rng.randint(2, 4))[: min(left, settings.row_tokens)]
        return Tokens(ids, [0 if i <= span else LOSS_KINDS.index("copy") + 1 for i in range(len(ids))]), []


@dataclass
class Tokens:
    """Token ids with the loss kind of each; for a branch, its prompt's last token and the context tokens with which
    its answer begins; for a context, its slots by index."""

    ids: list[int]
    kinds: list[int]
    prompt_end: int = 0
    places: list[int] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)


def find_places(context: list[int], answer: list[int], least: int = 3) -> list[int]:
    """Indices in `context` at which the answer's tokens stand (its first `least` tokens, if it has more)."""
    wanted = answer[:least]
    size = len(wanted)
    return [i for i, token in enumerate(context) if wanted and token == wanted[0] and context[i : i + size] == wanted]


class _Row:
    """A row that is being filled, group after group."""

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
        """Add a group, or as many of its branches as fit; False, and nothing added, when none fits."""
        room = self.left - len(context.ids)
        kept = []
        for branch in branches:
            if len(branch.ids) <= room:
                kept.append(branch)
                room -= len(branch.ids)
        if room < 0 and not branches and any(context.kinds):  # plain text may be cut where the row ends
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
    """Stack rows into int64 tensors with the row as first dimension; slots, if there are any, as `flatten_slots` says."""
    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0] if key != "slots"}
    slots = [item.get("slots", {}) for item in items]
    return batch | (flatten_slots(slots, batch["ids"].shape[1]) if any(slots) else {})
