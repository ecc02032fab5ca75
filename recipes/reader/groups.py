"""Groups of the small reader's training rows: one context and the questions that share it.

`head + context` is read once per row; every branch (a question and its answer) sees the context and itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from ...compressors.fidelity.questions import COMMON, DATE, NAME, NUMBER, make_questions
from ..data.records import cut_at_sentence as cut
from ..data.templates import LLAMA_INDEX_QA, LLAMA_INDEX_REFINE, QUESTION, REPEAT, SEPARATOR, UNANSWERABLE
from .corpus import ReaderCorpus, window


@dataclass(frozen=True)
class Format:
    """A prompt format: text before the context, text after it (with `{question}`), and whether it is a chat turn."""

    head: str
    tail: str
    chat: bool = False


_HEAD, _TAIL = LLAMA_INDEX_QA.replace("{query_str}", "{question}").split("{context_str}")
FORMATS = {
    "plain": Format("", SEPARATOR + QUESTION),
    "llama_index": Format(_HEAD, _TAIL),
    "chat": Format("", SEPARATOR + QUESTION, chat=True),
    "chat_llama_index": Format(_HEAD, _TAIL, chat=True),
}


@dataclass
class Branch:
    """A prompt without loss and the answer with loss; `kind` names the loss: `answer` or `copy`."""

    prompt: str
    answer: str
    kind: str = "answer"


@dataclass
class Group:
    """A context and its branches. `context_kind` is the loss on the context itself (None: no loss)."""

    context: str
    branches: list[Branch] = field(default_factory=list)
    format: Format = FORMATS["plain"]
    context_kind: str | None = None


class RowSettings(BaseModel):
    """The `mix` of a stage: contents of its rows, and weights of the losses.

    Attributes:
        row_tokens: tokens in a row.
        kinds: shares of the kinds of groups: copy, text, made, human, many (several passages), none, refine, repeat.
        formats: shares of prompt formats. questions: maximum number of questions per passage.
        swap: share of passages in which answers are renamed. unanswerable: share of questions of another passage.
        copy_tokens, copy_span: distinct tokens in random copying, and (min, max) tokens of a repeated segment.
        text_share: share of a context's tokens with the text loss. max_chars: maximum length of a passage.
        passages: (min, max) passages of a `many` group.
        windows: cut long passages to sentences from a random place instead of the beginning.
        pooled: share of contexts with pooled passages (`pooled_contexts`). pool_windows: weights of tokens per slot.
        weights: of the loss kinds, default 1. point: weight of the pointing loss. point_groups: key-value groups with a
            pointing head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row_tokens: int = Field(default=384, ge=32)
    kinds: dict[str, float] = {"copy": 1.0}
    formats: dict[str, float] = {"plain": 1.0}
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
    pool_windows: dict[PositiveInt, float] = {4: 1.0}
    weights: dict[Literal["answer", "text", "copy", "first"], float] = {}
    point: float = 0.0
    point_groups: PositiveInt = 1

    @model_validator(mode="after")
    def _known(self) -> RowSettings:
        makers = [name[5:] for name in dir(GroupMaker) if name.startswith("make_")]
        if unknown := sorted(set(self.kinds) - set(makers)):
            raise ValueError(f"kinds names {unknown[0]!r}; the kinds of groups are {', '.join(makers)}")
        if unknown := sorted(set(self.formats) - set(FORMATS)):
            raise ValueError(f"formats names {unknown[0]!r}; the prompt formats are {', '.join(FORMATS)}")
        return self


class GroupMaker:
    """Draws groups from a corpus; the method `make_KIND(rng)` draws the kind of that name in the mix."""

    def __init__(self, corpus: ReaderCorpus, settings: RowSettings) -> None:
        self.corpus, self.settings = corpus, settings

    def make(self, rng: random.Random) -> Group | None:
        """A group of a kind drawn from the mix; None: a row of random copying."""
        kind = rng.choices(list(self.settings.kinds), list(self.settings.kinds.values()))[0]
        return getattr(self, f"make_{kind}")(rng)

    def make_copy(self, rng: random.Random) -> None:
        """Random copying; `ReaderRows` makes it from token ids."""

    def make_text(self, rng: random.Random) -> Group:
        """Plain text: paragraphs of an article."""
        return Group(SEPARATOR.join(self.corpus.article(rng)[:3])[: 2 * self.settings.max_chars], context_kind="text")

    def make_repeat(self, rng: random.Random) -> Group:
        """Repeat the passage verbatim."""
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
            record, answer = rng.choice(self.corpus.many)
            others = [text for i, text in enumerate(record.passages) if i != record.gold][: count - 1]
            passages, pairs = [record.gold_text, *others], [(record.question, answer)]
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
        return self._ask(SEPARATOR.join(passages), pairs[: settings.questions], rng, None)

    def make_none(self, rng: random.Random) -> Group:
        """A question without any context."""
        question, answer = self.corpus.question(rng)
        return Group("", [Branch(QUESTION.format(question=question), " " + answer)])

    def make_refine(self, rng: random.Random) -> Group:
        """LlamaIndex's refine prompt: wrong answer and right passage, or right answer and another passage."""
        asked = self.corpus.human(rng)
        question, answer = rng.choice(asked.pairs)
        if rng.random() < 0.6:
            existing, context = rng.choice(self.corpus.answers or [answer]), asked.passage
        else:
            existing, context = answer, self.corpus.paragraph(rng, 500)
        prompt = LLAMA_INDEX_REFINE.format(
            query_str=question, existing_answer=existing, context_msg=cut(context, self.settings.max_chars)
        )
        return Group("", [Branch(prompt, " " + answer)] if answer in prompt else [])

    def _ask(self, passage: str, pairs: list[tuple[str, str]], rng: random.Random, context_kind: str | None) -> Group:
        """Group of a passage and its questions: some renamed, some unanswerable, in a random format."""
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
                question, answer = self.corpus.question(rng)[0], UNANSWERABLE.strip()
            branches.append(Branch(shape.tail.format(question=question), " " + answer))
        return Group(passage, branches, shape, context_kind)

    def _swap(self, texts: list[str], old: str, rng: random.Random) -> list[str]:
        """Renames `old` to another answer of its kind everywhere, if the new one does not occur yet."""
        kind = answer_kind(old)
        for _ in range(6):
            new = rng.choice(self.corpus.answers or [old])
            if answer_kind(new) == kind and new not in texts[0] and len(new.split()) <= 5:
                return rename(texts, old, new)
        return texts


def answer_kind(answer: str) -> str:
    """`date`, `number` or `name`, as in `find_spans`; `thing` for anything else."""
    if DATE.fullmatch(answer):
        return "date"
    if NUMBER.fullmatch(answer):
        return "number"
    return "name" if NAME.fullmatch(answer) and answer not in COMMON else "thing"


def rename(texts: Sequence[str], old: str, new: str) -> list[str]:
    """Replaces `old` by `new` in every text, whole words only."""
    pattern = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
    return [pattern.sub(lambda _: new, text) for text in texts]
