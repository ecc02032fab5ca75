"""Training items of a compressor: passages to compress and prompts that read them, drawn deterministically."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import Dataset

from ...compressors import Compressor, Reader, make_compressor
from ...compressors.fidelity.questions import make_questions, word_set
from ...compressors.objectives.registry import UNREAD, Target, needs_teacher, targets_of
from ..data.corpus import Record
from ..data.records import Material, load_records
from ..data.templates import (
    INSTRUCTION,
    QUESTION_TEMPLATES,
    SEPARATOR,
    Piece,
    Prompt,
    autoencoding_prompt,
    continuation_prompt,
    instruction_prompt,
    paraphrase_prompt,
    span_prompt,
)
from ..training.schema import Recipe, Span, Stage, validate

# Kinds of items, and what each offers to the objectives.
KINDS: dict[str, Target] = {
    "human": "answer",  # questions written by people
    "made": "answer",  # questions made by rule
    "both": "answer",  # the first, filled up with the second to `questions_per_passage`
    "instruct": "answer",  # the question is compressed with the passage: write it again, then the answer
    "repeat": "passage",
    "span": "passage",  # go on with a passage from some of its words
    "continue": "continuation",
    "paraphrase": "paraphrase",  # the passage again, in one of several wordings
    "match": "slots",
    "triple": "triple",  # a question, its passage and another one
    "rank": "ranking",  # a question and passages, the most relevant first
    "documents": "document",
}
NOT_READ = tuple(kind for kind, target in KINDS.items() if target in UNREAD)  # kinds without a prompt
FROM_QUESTIONS = ("human", "both", "instruct", "match", "triple", "rank")  # kinds that use the question records
T = TypeVar("T")
Data = TypeVar("Data", bound=BaseModel)
SPAN_WORDS = 12  # words of a span that the prompt gives (the paper: 10 to 20 tokens), and the fewest left to write
RANKED = 8  # passages of a ranking
BLOCK = 16  # batches drawn together and sorted by length, so that items of a batch have similar length


class QuestionData(BaseModel):
    """Fields that the `data` sections of compressor and token recipes share.

    Attributes:
        dir: folder of the files.
        questions: question sources (see `records`).
        max_chars: maximum length of a passage, in characters.
        max_answer_words: longer answers are not used.
        shares: weight of each question source, by the start of its name.
        dev: question source for `evaluate`, `dev_half` of it, `dev_limit` questions or passages.
    """

    model_config = ConfigDict(extra="forbid")

    dir: str | None = None
    questions: list[str] = []
    max_chars: int = Field(default=1600, ge=80)
    max_answer_words: int = Field(default=12, gt=0)
    shares: dict[str, float] | None = None
    dev: str | None = None
    dev_half: str | None = None
    dev_limit: int = Field(default=100, gt=0)

    def thinned(self, found: list[T]) -> list[T]:
        """About `dev_limit` of the dev items, evenly spread."""
        return found[:: max(1, len(found) // self.dev_limit)][: self.dev_limit]

    def records(self, sources: Sequence[str], half: str | None, shares: dict[str, float] | None) -> list[Record]:
        """The records of question sources, without those that ``shares`` does not name, if it is given."""
        found = load_records(sources, self.dir, half)
        return found if shares is None else [one for one in found if one.source.startswith(tuple(shares))]


def opened(recipe: Recipe, kind: str, schema: type[Data], reader: Reader | None) -> tuple[Data, Compressor]:
    """The checked data section and the untrained compressor of a recipe of some kind.

    Raises:
        ValueError: if the recipe is of another kind, or its data, method or settings cannot be used.
    """
    if recipe.kind != kind or recipe.compressor is None:
        raise ValueError(f"The recipe {recipe.name!r} trains a {recipe.kind}; one of kind {kind!r} is needed here.")
    data = validate(schema, recipe.data, recipe.name, "data")
    torch.manual_seed(recipe.seed)
    settings = dict(recipe.compressor)
    reader = reader or Reader.from_pretrained(str(recipe.reader))
    return data, make_compressor(settings.pop("method"), reader, **settings)


class CompressorData(QuestionData):
    """The `data` section of a compressor recipe.

    Attributes:
        texts: text sources (see `records`); `documents` articles of each are used.
        document_chars: maximum length of a document (`documents` in `mix`).
        questions_per_passage: questions per compressed passage, which is encoded once for all of them.
        templates: weights of the question formats (`plain`, `llama_index`).
        query_aware: one question per passage, which the compressor reads too; set by `compressor.query_aware`.
    """

    texts: list[str] = []
    documents: int | None = Field(default=None, gt=0)
    document_chars: int = Field(default=3000, ge=80)
    questions_per_passage: int = Field(default=3, gt=0)
    templates: dict[str, float] = {"plain": 1.0}
    query_aware: bool = False


@dataclass(frozen=True)
class Reading:
    """A prompt over an item's passages, its target and the objectives on it.

    Attributes:
        kind: `repeat`, `span`, `instruct`, `paraphrase`, `continue`, the name of a question template, or one of `NOT_READ`.
        target: text that follows the prompt, or the document; with `eos` an end-of-sequence token is added.
        wording: number of the paraphrase prompt.
        lead: text between the passages of `continue` or `span` and the target.
    """

    kind: str
    target: str
    objectives: tuple[str, ...]
    question: str = ""
    wording: int = 0
    eos: bool = True
    lead: str = ""

    def prompt(self, context: Sequence[Piece]) -> Prompt:
        """Prompt over `context`: texts for the teacher, compressed passages for the student."""
        if self.kind == "repeat":
            return autoencoding_prompt(context[0])
        if self.kind == "span":
            return span_prompt(context[0], self.lead)
        if self.kind == "instruct":
            return instruction_prompt(context[0])
        if self.kind == "paraphrase":
            return paraphrase_prompt(context[0], self.wording)
        if self.kind == "continue":
            return [*continuation_prompt(context), *([self.lead] if self.lead else [])]
        return QUESTION_TEMPLATES[self.kind](context, self.question)

    def behind_kv(self) -> Reading:
        """The reading for KV passages, after which a token must be run before one can be predicted.

        Moves a continuation's first word from the target into the prompt.
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
    """Passages and their readings. `key` seeds what is drawn for the batch that the item begins."""

    passages: tuple[str, ...]
    readings: tuple[Reading, ...]
    key: str

    @property
    def size(self) -> int:
        """Characters; batches are sorted by it."""
        return sum(map(len, self.passages or (reading.target for reading in self.readings)))


class ItemMaker:
    """Draws items. The method `_KIND(rng)` draws the kind of that name in a stage's `mix`."""

    def __init__(self, material: Material, data: CompressorData, stage: Stage) -> None:
        if unknown := sorted(set(stage.mix) - set(KINDS)):
            raise ValueError(f"Stage {stage.name!r}: mix names {unknown[0]!r}; the kinds are {', '.join(KINDS)}.")
        if not stage.mix or not all(isinstance(w, int | float) and w >= 0 for w in stage.mix.values()):
            raise ValueError(f"Stage {stage.name!r} needs mix: kinds of items, each with a weight of at least 0.")
        if unknown := sorted(set(data.templates) - set(QUESTION_TEMPLATES)):
            raise ValueError(f"data.templates names {unknown[0]!r}; the formats are {', '.join(QUESTION_TEMPLATES)}.")
        active = [name for name, weight in stage.objectives.items() if weight]
        self.objectives = {t: tuple(name for name in active if t in targets_of(name)) for t in KINDS.values()}
        for kind in NOT_READ:
            if bool(stage.mix.get(kind)) != bool(names := self.objectives[KINDS[kind]]):
                which = f"the objective {names[0]!r}" if names else f"an objective on a {KINDS[kind]!r} target"
                raise ValueError(f"Stage {stage.name!r}: {which} and the kind {kind!r} in mix need each other.")
        if stage.teacher_top_k is not None and not needs_teacher(active):
            raise ValueError(f"Stage {stage.name!r} sets teacher_top_k but no objective with a teacher, such as kl.")
        self.material, self.data, self.stage = material, data, stage

    def make(self, key: str) -> Item:
        """The item of a key; equal keys give equal items."""
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

    def _both(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        asked = self.material.human(rng)
        pairs = rng.sample(asked.pairs, len(asked.pairs))
        missing = self.data.questions_per_passage - len(pairs)
        return self._ask(asked.passage, pairs + make_questions(asked.passage, missing, rng), rng)

    def _repeat(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self._any_passage(rng, rng.choice([150, 300, 500]))
        return [passage], [Reading("repeat", passage, self.objectives["passage"])]

    def _span(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self._any_passage(rng, self.data.max_chars)
        starts = [match.start() for match in re.finditer(r"(?<=\s)\S", passage)]
        if len(starts) <= 2 * SPAN_WORDS:
            return [passage], []
        first = rng.randrange(len(starts) - 2 * SPAN_WORDS)
        begin, cut = starts[first], starts[first + SPAN_WORDS]
        lead = passage[begin:cut].rstrip()
        target = passage[begin + len(lead) :]
        return [passage], [Reading("span", target, self.objectives["passage"], lead=lead)]

    def _instruct(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        asked = self.material.human(rng)
        question, answer = rng.choice(asked.pairs)
        compressed = f"{asked.passage}{SEPARATOR}{INSTRUCTION} {question}"
        return [compressed], [Reading("instruct", f" {question}\nAnswer: {answer}", self.objectives["answer"])]

    def _triple(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        asked = self.material.human(rng)
        question = rng.choice(asked.pairs)[0]
        passages = [question, asked.passage, self.material.distractor(rng, asked.passage)]
        return passages, [Reading("triple", question, self.objectives["triple"], eos=False)]

    def _rank(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        asked = self.material.human(rng)
        question = rng.choice(asked.pairs)[0]
        others = {self.material.distractor(rng, asked.passage) for _ in range(RANKED - 1)}
        ranked = [asked.passage, *sorted(others, key=lambda text: (-shared_words(question, text), text))]
        return ranked, [Reading("rank", question, self.objectives["ranking"], question, eos=False)]

    def _paraphrase(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self._any_passage(rng, rng.choice([150, 300, 500]))
        return [passage], [Reading("paraphrase", passage, self.objectives["paraphrase"], wording=rng.randrange(64))]

    def _continue(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage, rest = self.material.text_and_continuation(rng)
        return [passage], [Reading("continue", rest, self.objectives["continuation"], eos=False)]

    def _match(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        passage = self.draw_passage(self.material, rng)
        return [passage], [Reading("match", passage, self.objectives["slots"], eos=False)]

    def _documents(self, rng: random.Random) -> tuple[Sequence[str], list[Reading]]:
        text = self.material.document(rng, self.data.document_chars)
        return [], [Reading("documents", text, self.objectives["document"], eos=False)]

    @staticmethod
    def draw_passage(material: Material, rng: random.Random) -> str:
        """A passage of the questions or the texts, each in half of the draws if both exist."""
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
        """Questions about `passage`, which is shuffled among others (`passages` of the stage)."""
        count = self._count(rng)
        passages = [passage, *(self.material.distractor(rng, passage) for _ in range(count - 1))]
        rng.shuffle(passages)
        formats, weights = list(self.data.templates), list(self.data.templates.values())
        readings = []
        for question, answer in pairs[: 1 if self.data.query_aware else self.data.questions_per_passage]:
            readings.append(
                Reading(rng.choices(formats, weights)[0], " " + answer, self.objectives["answer"], question)
            )
        return passages, readings

    def _count(self, rng: random.Random) -> int:
        wanted = self.stage.passages
        if isinstance(wanted, Span):
            return rng.randint(max(1, math.ceil(wanted.min)), max(1, math.floor(wanted.max)))
        return rng.choice(wanted) if isinstance(wanted, list) else wanted


class CompressorItems(Dataset[Item]):
    """Endless items in batches of similar length. Item i depends only on `seed`, `stage` and i.

    Draws items for `BLOCK` batches, sorts them by length, cuts them into batches and shuffles the batches.
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


def shared_words(question: str, text: str) -> int:
    """Number of different words of a question that occur in a text."""
    return len(word_set(question) & word_set(text))


def draw_ratio(ratios: list[float] | Span | None, key: str) -> float | None:
    """Compression ratio of the batch that begins with the item `key`."""
    rng: Any = random.Random(f"{key}/ratio")
    if isinstance(ratios, Span):
        return math.exp(rng.uniform(math.log(ratios.min), math.log(ratios.max)))
    return rng.choice(ratios) if ratios else None
