"""Training task of a sentence pruner: which sentences of a passage a question needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...compressors import Reader
from ...compressors.core.checkpoint import read_weights
from ...compressors.core.shipped import locate
from ...compressors.text.pruning import PruneExample, TrainedPruner, sentence_spans
from ..data.records import Asked, Material
from ..training.schema import Recipe, Stage
from . import sentence_labels
from .items import CompressorItems, QuestionData, opened
from .sentence_labels import Value, holds, texts_of
from .token_labels import answer_labels

KINDS = ("questions", "distractors")
_NEAR = 8  # passages before and after one in the file that count as its neighbours: the same article, mostly
_JOINED = 5  # most sentences that are put beside a passage of one sentence


class SentenceData(QuestionData):
    """The `data` section of a recipe of kind `sentences`.

    Attributes:
        labels: `needed`, or one of FILCO's oracles: `inclusion`, `lexical`, `gain` (which runs the reader).
        start: shipped name or folder of a trained compressor; its tensors of the same name and shape are the first weights.
    """

    labels: Literal["needed", "inclusion", "lexical", "gain"] = "needed"
    start: str | None = None
    dev_limit: int = Field(default=200, gt=0)


@dataclass(frozen=True)
class PruneItem:
    """A question, a passage and the answer, which is empty for a passage of another question."""

    question: str
    passage: str
    answer: str
    relevant: bool
    key: str

    @property
    def size(self) -> int:
        """Characters; batches are sorted by it."""
        return len(self.passage)


class PrunerModule(nn.Module):
    """The loss of a pruner on a batch of examples."""

    def __init__(self, compressor: TrainedPruner) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, examples: list[PruneExample]) -> dict[str, Any]:
        """Loss of a batch and its parts."""
        found: dict[str, Any] = dict(self.compressor.loss(examples))
        return found | {"tokens": sum(len(example.passage) for example in examples) // 4}


class SentenceTask:
    """Task of a recipe of kind `sentences`, for `run_recipe`.

    Args:
        recipe: its compressor is a `TrainedPruner`.
        reader: the reader; default: the recipe's own. It runs for the labels `gain` alone.

    Raises:
        ValueError: if the recipe's reader, data, method or settings cannot be used.
    """

    def __init__(self, recipe: Recipe, reader: Reader | None = None) -> None:
        self.recipe = recipe
        self.data, found = opened(recipe, "sentences", SentenceData, reader)
        if not isinstance(found, TrainedPruner):
            method = found.config.method
            raise ValueError(f"A recipe of kind 'sentences' trains a pruner of sentences, and {method} is none.")
        self.compressor: TrainedPruner = found
        start = self.data.start
        if start is not None and not found.start_from(read_weights(Path(locate(start)))):
            raise ValueError(f"data.start: {start} has no tensor that fits the compressor of the recipe.")
        self.module = PrunerModule(found)
        self._material: Material | None = None
        self._places: dict[str, tuple[str, int]] = {}
        self._dev: list[tuple[Asked, str]] | None = None

    @property
    def material(self) -> Material:
        """Passages with questions, read at first use."""
        if self._material is None:
            self._material = self._passages(self.data.questions, shares=self.data.shares)
            if not self._material.asked:
                raise ValueError("data.questions holds no usable question; see max_chars and max_answer_words.")
            for name, several in self._material.asked.items():
                self._places |= {asked.passage: (name, i) for i, asked in enumerate(several)}
        return self._material

    def _passages(
        self, sources: Sequence[str], half: str | None = None, shares: dict[str, float] | None = None
    ) -> Material:
        data = self.data
        records = data.records(sources, half, shares)
        return Material(records, [], data.max_chars, data.max_answer_words, verbatim=False, shares=shares)

    # -- items ---------------------------------------------------------------------------------------------------------

    def make(self, key: str, mix: dict[str, float]) -> PruneItem:
        """The item of a key; equal keys give equal items."""
        rng = random.Random(key)
        relevant = rng.choices(list(mix), list(mix.values()))[0] == "questions"
        asked = self.material.human(rng)
        question, answer = rng.choice(asked.pairs)
        parts = [asked.passage] if relevant else [self._other(asked, answer, rng)]
        if len(sentence_spans(asked.passage)) == 1:
            # A passage of one sentence says nothing of the choice among sentences.
            parts += [self._other(asked, answer, rng) for _ in range(rng.randint(1, _JOINED))]
            rng.shuffle(parts)
        passage = " ".join(parts) if sum(map(len, parts)) <= self.data.max_chars else parts[0]
        return PruneItem(question, passage, answer, relevant and asked.passage in passage, key)

    def _other(self, asked: Asked, answer: str, rng: random.Random) -> str:
        """A passage without the answer, mostly one of the same article.

        Raises:
            ValueError: if there is no other passage without the answer.
        """
        name, place = self._places[asked.passage]
        several = self.material.asked[name]
        near = [several[i] for i in range(max(0, place - _NEAR), min(len(several), place + _NEAR + 1)) if i != place]
        for _ in range(8):
            found = rng.choice(near) if near and rng.random() < 0.7 else self.material.human(rng)
            if found.passage != asked.passage and not holds(found.passage, answer):
                return found.passage
        every = [one.passage for several in self.material.asked.values() for one in several]
        start = rng.randrange(len(every))
        for passage in every[start:] + every[:start]:
            if passage != asked.passage and not holds(passage, answer):
                return passage
        raise ValueError(
            f"The data holds too few different passages: none but that of the question lacks the answer {answer!r}."
        )

    def dataset(self, stage: Stage) -> CompressorItems:
        """Items of a stage; `mix` weighs `questions` and `distractors` (default: two to one)."""
        mix = dict(stage.mix) or {"questions": 2.0, "distractors": 1.0}
        if unknown := sorted(set(mix) - set(KINDS)):
            raise ValueError(f"Stage {stage.name!r}: mix names {unknown[0]!r}; the kinds are {', '.join(KINDS)}.")
        if not all(isinstance(w, int | float) and w >= 0 for w in mix.values()) or not sum(mix.values()):
            raise ValueError(f"Stage {stage.name!r}: mix needs weights of at least 0, one of them above it; got {mix}.")
        return CompressorItems(lambda key: self.make(key, mix), self.recipe.seed, stage)  # type: ignore[arg-type,return-value]

    def example(self, item: PruneItem) -> PruneExample:
        """An item with its labels."""
        spans = sentence_spans(item.passage)
        values: Sequence[Value] = [0.0] * len(spans)
        words = answer_labels(
            item.passage, item.question, item.answer if item.relevant else "", random.Random(item.key)
        )
        kept = words.values if item.relevant else (0,) * len(words.spans)
        if item.relevant:
            values = self._values(texts_of(item.passage, spans), item.question, item.answer)
        return PruneExample(item.question, item.passage, tuple(spans), tuple(values), words.spans, kept)

    def _values(self, sentences: Sequence[str], question: str, answer: str) -> list[Value]:
        if self.data.labels == "gain":
            return sentence_labels.gain(self.compressor.base_reader, sentences, question, answer)
        return getattr(sentence_labels, self.data.labels)(sentences, question, answer)

    def collator(self, stage: Stage) -> Callable[[list[PruneItem]], dict[str, Any]]:
        """Collates items into examples with labels."""
        return lambda items: {"examples": [self.example(item) for item in items]}

    # -- training ------------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: Stage) -> None:
        """Trains all weights of the compressor."""
        if stage.trainable not in ("all", ["all"]):
            raise ValueError(
                f"Stage {stage.name!r}: a recipe of kind 'sentences' trains 'all', got {stage.trainable!r}."
            )
        self.compressor.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """Writes the compressor."""
        self.compressor.save_pretrained(folder, dtype=self.recipe.output.torch_dtype)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Percentages on `data.dev`.

        Returns:
            `best`: passages whose best sentence holds the answer, among those where some sentence does; `best_first`: the
            same for the first sentence; `ranked`: passages whose best sentence scores above that of the next passage.
        """
        if not self.data.dev:
            raise ValueError(f"Stage {stage.name!r} sets eval_every, which needs data.dev: a question file.")
        if self._dev is None:
            held = self._passages([self.data.dev], self.data.dev_half)
            asked = [one for source in held.asked.values() for one in source]
            self._dev = [(one, asked[(i + 1) % len(asked)].passage) for i, one in enumerate(asked)]
            self._dev = self.data.thinned(self._dev)
        rng = random.Random(0)
        pairs = [rng.choice(one.pairs) for one, _ in self._dev]
        questions = [question for question, _ in pairs]
        training = self.compressor.training
        self.compressor.eval()
        with torch.no_grad():
            found = self.compressor.score_sentences([one.passage for one, _ in self._dev], questions)
            others = self.compressor.score_sentences([other for _, other in self._dev], questions)
        self.compressor.train(training)
        best, first, ranked = [], [], []
        for (one, _), (_, answer), here, there in zip(self._dev, pairs, found, others):
            right = [holds(sentence, answer) for sentence in texts_of(one.passage, here.spans)]
            if any(right):
                best.append(right[int(here.values.argmax())])
                first.append(right[0])
            ranked.append(_most(here.values) > _most(there.values))
        figures = {"best": best, "best_first": first, "ranked": ranked}
        return {name: 100 * sum(values) / max(1, len(values)) for name, values in figures.items()}


def _most(values: Tensor) -> float:
    return float(values.max()) if len(values) else float("-inf")
