"""Training task of a token classifier (LLMLingua-2): cross-entropy of keep and drop over the tokens of passages."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...compressors import Reader
from ...compressors.core.batching import pad_rows
from ...compressors.text.llmlingua2 import LLMLingua2Compressor
from ..data.corpus import find_files, read_pairs
from ..data.records import Asked, Material, need_folder
from ..training.schema import Recipe, Stage
from .items import CompressorItems, QuestionData, opened
from .token_labels import IGNORE, Labels, align, answer_labels, question_labels, trusted

KINDS = ("questions", "pairs")


class TokenData(QuestionData):
    """The `data` section of a token recipe. Questions are labelled by `question_labels`; `shares` leaves out other sources.

    Attributes:
        pairs: files of JSON lines `{"original": ..., "compressed": ...}`, labelled by `align`.
        min_questions: passages with fewer questions are left out.
        questions_per_passage: maximum number of questions that label a passage, drawn anew each time; dozens of questions
            together would keep nearly every word.
    """

    pairs: list[str] = Field(default=[])
    min_questions: int = Field(default=3, gt=0)
    questions_per_passage: int = Field(default=6, gt=0)
    dev_limit: int = Field(default=200, gt=0)


@dataclass(frozen=True)
class TokenItem:
    """A passage and the labels of its words, for its question if the classifier is query-aware."""

    passage: str
    labels: Labels
    key: str
    question: str | None = None

    @property
    def size(self) -> int:
        """Characters; batches are sorted by it."""
        return len(self.passage)


class TokenModule(nn.Module):
    """Mean cross-entropy over the labelled tokens. Its parameters are LoRA and head; the encoder is frozen."""

    accepts_loss_kwargs = True

    def __init__(self, compressor: LLMLingua2Compressor) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(
        self, ids: Tensor, mask: Tensor, labels: Tensor, num_items_in_batch: int | None = None
    ) -> dict[str, Any]:
        """Loss, accuracy and keep rates of a batch.

        Args:
            ids, mask, labels: ``[rows, time]``; a label is 0, 1 or `IGNORE`.
            num_items_in_batch: labelled tokens over all accumulated batches; default: this batch's.
        """
        logits = self.compressor.words.logits(ids, mask).float()
        known = labels != IGNORE
        wanted, found = labels[known], logits[known]
        total = cross_entropy(found, wanted, reduction="sum") if len(wanted) else logits.sum() * 0.0
        given = found.argmax(-1)
        count = max(1, len(wanted))
        return {
            "loss": total / max(1, num_items_in_batch or count),
            "accuracy": (given == wanted).sum() / count,
            "keep_rate/labels": wanted.sum() / count,
            "keep_rate/given": given.sum() / count,
            "tokens": int(mask.sum()),
        }


class TokenTask:
    """Task of a recipe of kind `tokens`, for `run_recipe`.

    Args:
        recipe: of kind `tokens`; its compressor is `llmlingua2` without a finished classifier.
        reader: the reader; default: the recipe's own. It is neither trained nor run.

    Raises:
        ValueError: if the recipe's reader, data, method or settings cannot be used.
    """

    def __init__(self, recipe: Recipe, reader: Reader | None = None) -> None:
        self.recipe = recipe
        self.data, found = opened(recipe, "tokens", TokenData, reader)
        if not isinstance(found, LLMLingua2Compressor) or found.words.tagger is None:
            raise ValueError("A recipe of kind 'tokens' trains llmlingua2 with LoRA and a head: leave out classifier.")
        self.compressor: LLMLingua2Compressor = found
        self.module = TokenModule(found)
        self._material: Material | None = None
        self._pairs: list[tuple[str, Labels]] | None = None
        self._dev: list[TokenItem] | None = None

    @property
    def material(self) -> Material:
        """Passages with questions, read at first use."""
        if self._material is None:
            self._material = self._passages(self.data.questions, shares=self.data.shares)
            if not self._material.asked:
                least = self.data.min_questions
                raise ValueError(f"data.questions holds no passage with {least} usable questions; lower min_questions.")
        return self._material

    def _passages(
        self, sources: Sequence[str], half: str | None = None, shares: dict[str, float] | None = None
    ) -> Material:
        data = self.data
        records = data.records(sources, half, shares)
        counts = Counter((record.source, record.gold_text) for record in records)
        records = [r for r in records if counts[r.source, r.gold_text] >= data.min_questions]
        return Material(records, [], data.max_chars, data.max_answer_words, verbatim=False, shares=shares)

    @property
    def pairs(self) -> list[tuple[str, Labels]]:
        """Texts with the labels from their compressed forms, read at first use."""
        if self._pairs is None:
            files = [f for source in self.data.pairs for f in find_files(need_folder(self.data.dir, source), [source])]
            rows = [row for file in files for row in read_pairs(file)]
            aligned = [align(original, compressed) for original, compressed in rows]
            stay = trusted(aligned)
            self._pairs = [(rows[i][0], aligned[i].labels) for i in stay]
            if not self._pairs:
                raise ValueError("data.pairs holds no usable pair; give JSON lines with 'original' and 'compressed'.")
        return self._pairs

    def _labels(self, asked: Asked, rng: random.Random) -> tuple[Labels, str | None]:
        if self.compressor.query_aware:
            question, answer = rng.choice(asked.pairs)
            return answer_labels(asked.passage, question, answer, rng), question
        pairs = rng.sample(asked.pairs, min(self.data.questions_per_passage, len(asked.pairs)))
        return question_labels(asked.passage, pairs), None

    def make(self, key: str, mix: dict[str, float]) -> TokenItem:
        """The item of a key; equal keys give equal items."""
        rng = random.Random(key)
        if rng.choices(list(mix), list(mix.values()))[0] == "pairs":
            return TokenItem(*rng.choice(self.pairs), key)
        asked = self.material.human(rng)
        labels, question = self._labels(asked, rng)
        return TokenItem(asked.passage, labels, key, question)

    def dataset(self, stage: Stage) -> CompressorItems:
        """Items of a stage; `mix` weighs `questions` and `pairs` (default: questions only)."""
        mix = dict(stage.mix) or {"questions": 1.0}
        if unknown := sorted(set(mix) - set(KINDS)):
            raise ValueError(f"Stage {stage.name!r}: mix names {unknown[0]!r}; the kinds are {', '.join(KINDS)}.")
        if not all(isinstance(w, int | float) and w >= 0 for w in mix.values()) or not sum(mix.values()):
            raise ValueError(f"Stage {stage.name!r}: mix needs weights of at least 0, one of them above it; got {mix}.")
        return CompressorItems(lambda key: self.make(key, mix), self.recipe.seed, stage)  # type: ignore[arg-type,return-value]

    def rows(self, item: TokenItem) -> Iterator[tuple[list[int], list[int]]]:
        """The classifier's input rows of an item, with token labels."""
        pieces, ranges, head = self.compressor.words.rows(item.passage, item.question)
        of, after = item.labels.of_tokens(pieces.offsets), self.compressor.words.pieces.after
        for a, b in ranges:
            yield [*head, *pieces.ids[a:b], *after], [*[IGNORE] * len(head), *of[a:b], *[IGNORE] * len(after)]

    def collator(self, stage: Stage) -> Callable[[list[TokenItem]], dict[str, Any]]:
        """Collates items into ids, mask and labels, and counts the labelled tokens."""

        def collate(items: list[TokenItem]) -> dict[str, Any]:
            rows = [row for item in items for row in self.rows(item)]
            ids, mask = pad_rows([ids for ids, _ in rows], self.compressor.words.pieces.pad)
            labels, _ = pad_rows([labels for _, labels in rows], IGNORE)
            return {"ids": ids, "mask": mask, "labels": labels, "num_items": int((labels != IGNORE).sum())}

        return collate

    def begin_stage(self, stage: Stage) -> None:
        """Trains the parts in `trainable`: `all`, `lora` or `head`."""
        wanted = [stage.trainable] if isinstance(stage.trainable, str) else stage.trainable
        if unknown := sorted(set(wanted) - {"all", "lora", "head"}):
            raise ValueError(
                f"Stage {stage.name!r}: nothing called {unknown[0]!r} to train; there are all, lora, head."
            )
        for name, parameter in self.compressor.named_parameters():
            parameter.requires_grad_(any(w == "all" or w in name.split(".") for w in wanted))

    def save(self, folder: Path) -> None:
        """Writes the compressor."""
        self.compressor.save_pretrained(folder, dtype=self.recipe.output.torch_dtype)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Token F1 (percent) on `data.dev`, keeping as many tokens per passage as its labels do.

        Returns:
            `f1` of the classifier, `f1_idf` of the rarest tokens (document frequencies from `data.questions`), `f1_random`
            (expected), `keep_rate` of the labels, and `accuracy` at probability 1/2.
        """
        if not self.data.dev:
            raise ValueError(f"Stage {stage.name!r} sets eval_every, which needs data.dev: a question file.")
        if self._dev is None:
            held = self._passages([self.data.dev], self.data.dev_half)
            asked = [one for source in held.asked.values() for one in source]
            drawn = [(one.passage, *self._labels(one, random.Random(one.passage))) for one in self.data.thinned(asked)]
            self._dev = [TokenItem(passage, labels, passage, question) for passage, labels, question in drawn]
        rarity = self._rarity()
        training = self.compressor.training
        found = self.compressor.eval().words.probabilities(
            [item.passage for item in self._dev], [item.question for item in self._dev]
        )
        self.compressor.train(training)
        hits = {"f1": 0.0, "f1_idf": 0.0, "f1_random": 0.0}
        kept = tokens = right = 0
        for item, (pieces, values) in zip(self._dev, found):
            wanted = torch.tensor(item.labels.of_tokens(pieces.offsets))
            known = (wanted != IGNORE).nonzero()[:, 0]
            if not len(known):
                continue
            wanted, values = wanted[known], values[known]
            k = int(wanted.sum())
            rare = torch.tensor([rarity.get(pieces.ids[i], math.inf) for i in known.tolist()])
            hits["f1"] += float(wanted[values.topk(k).indices].sum())
            hits["f1_idf"] += float(wanted[rare.topk(k).indices].sum())
            hits["f1_random"] += k * k / len(known)
            right += int(((values > 0.5) == wanted.bool()).sum())
            kept, tokens = kept + k, tokens + len(known)
        # As many tokens are taken as labelled, so precision, recall and F1 are equal.
        scores = {name: 100 * value / max(1, kept) for name, value in hits.items()}
        return {**scores, "keep_rate": kept / max(1, tokens), "accuracy": 100 * right / max(1, tokens)}

    def _rarity(self) -> dict[int, float]:
        passages = [one.passage for source in self.material.asked.values() for one in source]
        seen = Counter(i for passage in passages for i in set(self.compressor.words.pieces(passage).ids))
        return {i: math.log(len(passages) / n) for i, n in seen.items()}
