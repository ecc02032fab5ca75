"""What a compressor is trained on: passages to compress and the prompts that read them, drawn deterministically."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import Dataset

from ..data.questions import make_questions
from ..data.records import Material
from ..data.templates import (
    QUESTION_TEMPLATES,
    SEPARATOR,
    UNANSWERABLE,
    Piece,
    Prompt,
    autoencoding_prompt,
    continuation_prompt,
    paraphrase_prompt,
)
from ..training.schema import Objective, Span, Stage

NOT_READ = ("match", "documents")  # kinds of readings that put nothing into a prompt
BLOCK = 16  # batches drawn together and sorted by length, so that a batch holds items of like length


class CompressorData(BaseModel):
    """The `data` section of a compressor recipe.

    Attributes:
        dir: folder of the files.
        texts, questions: sources (see `records`); `documents` articles of each text source are kept.
        max_chars: the longest passage, in characters; `document_chars` the longest document (`documents` in `mix`).
        max_answer_words, verbatim: which answers count (see `Material`).
        shares: weight of each question source, by the start of its name.
        questions_per_passage: prompts that read one compressed passage; it is encoded once for all of them.
        mismatch: share of questions that are put to another passage, the answer being `unanswerable`.
        templates: weights of the question formats (`plain`, `llama_index`).
        query_aware: each passage gets one question, which the compressor reads too; `compressor.query_aware` sets it.
        dev: question source for `evaluate`, `dev_half` of it, `dev_limit` questions.
    """

    model_config = ConfigDict(extra="forbid")

    dir: str | None = None
    texts: list[str] = []
    questions: list[str] = []
    documents: int | None = Field(default=None, gt=0)
    max_chars: int = Field(default=1600, ge=80)
    document_chars: int = Field(default=3000, ge=80)
    max_answer_words: int = Field(default=12, gt=0)
    verbatim: bool = True
    shares: dict[str, float] | None = None
    questions_per_passage: int = Field(default=3, gt=0)
    mismatch: float = Field(default=0.0, ge=0, lt=1)
    templates: dict[str, float] = {"plain": 1.0}
    query_aware: bool = False
    dev: str | None = None
    dev_half: str | None = None
    dev_limit: int = Field(default=100, gt=0)


@dataclass(frozen=True)
class Reading:
    """One prompt over an item's passages, what must follow it, and the objectives that are taken there.

    Attributes:
        kind: `repeat`, `paraphrase`, `continue`, the name of a question template, or one of `NOT_READ`.
        target: the text that follows, or the document; `eos` closes it.
        wording: which of the paraphrase prompts.
        lead: text between the passages of `continue` and the target.
    """

    kind: str
    target: str
    objectives: tuple[Objective, ...]
    question: str = ""
    wording: int = 0
    eos: bool = True
    lead: str = ""

    def prompt(self, context: Sequence[Piece]) -> Prompt:
        """The prompt over `context`: texts for the teacher, compressed passages for the student."""
        if self.kind == "repeat":
            return autoencoding_prompt(context[0])
        if self.kind == "paraphrase":
            return paraphrase_prompt(context[0], self.wording)
        if self.kind == "continue":
            return [*continuation_prompt(context), *([self.lead] if self.lead else [])]
        return QUESTION_TEMPLATES[self.kind](context, self.question)

    def behind_kv(self) -> Reading:
        """The same reading for passages of keys and values, behind which something must be run before a token is predicted.

        A continuation's first word moves from the target into the prompt.
        """
        if self.kind != "continue" or self.lead:
            return self
        first = re.match(r"\s*\S+", self.target)
        rest = self.target[first.end() :] if first else ""
        if not first or not rest.strip():
            return replace(self, lead=SEPARATOR)
        return replace(self, lead=first.group(), target=rest)


@dataclass(frozen=True)
class Item:
    """Passages and the readings of them. `key` seeds whatever is drawn for the batch that the item begins."""

    passages: tuple[str, ...]
    readings: tuple[Reading, ...]
    key: str

    @property
    def size(self) -> int:
        """Characters of the passages, or of the document where there are none: what batches are sorted by."""
        return sum(map(len, self.passages or (reading.target for reading in self.readings)))


class ItemMaker:
    """Draws items; every method `_KIND(rng)` is one kind that a stage's `mix` may name.

    `human` and `made` are questions by people and by rule; `repeat` asks for the passage again (AE); `continue` for what
    follows it; `paraphrase` for its text in one of several wordings (LM: xRAG's first stage); `match` asks nothing, its
    slots are compared with the passage's embeddings; `documents` are texts for the method's own objective `segments`.
    """

    KINDS = ("human", "made", "repeat", "continue", "paraphrase", "match", "documents")

    def __init__(self, material: Material, data: CompressorData, stage: Stage) -> None:
        if unknown := sorted(set(stage.mix) - set(self.KINDS)):
            raise ValueError(f"Stage {stage.name!r}: mix names {unknown[0]!r}; the kinds are {', '.join(self.KINDS)}.")
        if not stage.mix or not all(isinstance(w, int | float) and w >= 0 for w in stage.mix.values()):
            raise ValueError(f"Stage {stage.name!r} needs mix: kinds of items, each with a weight of at least 0.")
        if unknown := sorted(set(data.templates) - set(QUESTION_TEMPLATES)):
            raise ValueError(f"data.templates names {unknown[0]!r}; the formats are {', '.join(QUESTION_TEMPLATES)}.")
        if bool(stage.mix.get("documents")) != bool(stage.objectives.get("segments")):
            raise ValueError(f"Stage {stage.name!r}: the objective segments and documents in mix need each other.")
        if stage.teacher_top_k is not None and not stage.objectives.get("kl"):
            raise ValueError(f"Stage {stage.name!r} sets teacher_top_k but gives the objective kl no weight.")
        self.material, self.data, self.stage = material, data, stage
        self.answering: tuple[Objective, ...] = tuple(
            name
            for name in ("lm", "kl")
            if stage.objectives.get(name)  # type: ignore[misc]
        )

    def make(self, key: str) -> Item:
        """The item of a key: always the same one."""
        rng = random.Random(key)
        kinds, weights = list(self.stage.mix), list(self.stage.mix.values())
        for _ in range(64):
            kind = rng.choices(kinds, weights)[0]
            passages, readings = getattr(self, f"_{kind}")(rng)
            readings = tuple(reading for reading in readings if reading.objectives and reading.target.strip())
            if readings:
                return Item(tuple(passages), readings, key)
        wanted = [name for name, weight in self.stage.objectives.items() if weight]
        raise ValueError(f"Stage {self.stage.name!r}: nothing in mix {kinds} can train the objectives {wanted}.")

    def _human(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        asked = self.material.human(rng)
        pairs = list(asked.pairs)
        rng.shuffle(pairs)
        return self._ask(asked.passage, pairs, rng)

    def _made(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self.material.paragraph(rng, rng.choice([300, 600, self.data.max_chars]))
        return self._ask(passage, make_questions(passage, self.data.questions_per_passage, rng), rng)

    def _repeat(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self._any_passage(rng, rng.choice([150, 300, 500]))
        return [passage], [Reading("repeat", passage, ("ae",) if self.stage.objectives.get("ae") else ())]

    def _paraphrase(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self._any_passage(rng, rng.choice([150, 300, 500]))
        objectives: tuple[Objective, ...] = ("lm",) if self.stage.objectives.get("lm") else ()
        return [passage], [Reading("paraphrase", passage, objectives, wording=rng.randrange(64))]

    def _continue(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage, rest = self.material.text_and_continuation(rng)
        return [passage], [Reading("continue", rest, self.answering, eos=False)]

    def _match(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self.draw_passage(self.material, rng)
        return [passage], [
            Reading("match", passage, ("match",) if self.stage.objectives.get("match") else (), eos=False)
        ]

    def _documents(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        text = self.material.document(rng, self.data.document_chars)
        return [], [Reading("documents", text, ("segments",), eos=False)]

    @staticmethod
    def draw_passage(material: Material, rng: random.Random) -> str:
        """A passage of either kind of material, half of them with questions where there are both."""
        if material.asked and (not material.articles or rng.random() < 0.5):
            return material.human(rng).passage
        return material.paragraph(rng, rng.choice([150, 300, 500]))

    def _any_passage(self, rng: random.Random, max_chars: int) -> str:
        if self.material.articles:
            return self.material.paragraph(rng, max_chars)
        return self.material.human(rng).passage[:max_chars]

    def _ask(
        self, passage: str, pairs: Sequence[tuple[str, str]], rng: random.Random
    ) -> tuple[list[str], list[Reading]]:
        """Questions about `passage`, which stands among as many others as the stage's `passages` says."""
        count = self._count(rng)
        passages = [passage, *(self.material.distractor(rng, passage) for _ in range(count - 1))]
        rng.shuffle(passages)
        formats, weights = list(self.data.templates), list(self.data.templates.values())
        readings = []
        for question, answer in pairs[: 1 if self.data.query_aware else self.data.questions_per_passage]:
            answer = " " + answer
            if self.data.mismatch and rng.random() < self.data.mismatch:
                question, answer = rng.choice(self.material.human(rng).pairs)[0], UNANSWERABLE
            readings.append(Reading(rng.choices(formats, weights)[0], answer, self.answering, question))
        return passages, readings

    def _count(self, rng: random.Random) -> int:
        wanted = self.stage.passages
        if isinstance(wanted, Span):
            return rng.randint(max(1, math.ceil(wanted.min)), max(1, math.floor(wanted.max)))
        return rng.choice(wanted) if isinstance(wanted, list) else wanted


class CompressorItems(Dataset[Item]):
    """Endless items in batches of like length. Item i depends only on `seed`, `stage` and i.

    Items are drawn `BLOCK` batches at a time, sorted by length, cut into batches, and the batches shuffled.
    """

    def __init__(self, make: Callable[[str], Item], seed: int, stage: Stage) -> None:
        self.batch = stage.batch_size
        size, prefix = BLOCK * self.batch, f"{seed}/{stage.name}"

        @lru_cache(maxsize=2)
        def block(number: int) -> list[Item]:
            items = [make(f"{prefix}/{number * size + offset}") for offset in range(size)]
            items.sort(key=lambda item: item.size)
            order = list(range(BLOCK))
            random.Random(f"{prefix}/order/{number}").shuffle(order)
            return [item for which in order for item in items[which * self.batch : (which + 1) * self.batch]]

        self._block, self._size = block, size

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Item:
        return self._block(index // self._size)[index % self._size]


def draw_ratio(ratios: list[float] | Span | None, key: str) -> float | None:
    """The compression ratio of the batch that the item `key` begins."""
    rng: Any = random.Random(f"{key}/ratio")
    if isinstance(ratios, Span):
        return math.exp(rng.uniform(math.log(ratios.min), math.log(ratios.max)))
    return rng.choice(ratios) if ratios else None
