"""Training task with a reward: the reader's answers from what the compressor draws, against those from the full text.

The policy gradient is self-critical (Rennie et al., arXiv 1612.00563): the reward of the likeliest output is the baseline, so
that nothing but the compressor is trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...compressors import Reader
from ...compressors.base import Compressor
from ...compressors.encoders.embedder import MINILM, load_embedder
from ...compressors.fidelity.questions import ASKED
from ...compressors.text.sampling import Sample, Sampler
from ...compressors.text.scoring import self_information
from ..data.records import Asked, Material, load_records
from ..training.schema import Recipe, Stage
from .items import CompressorItems, QuestionData, draw_ratio, opened

MISSED = -0.01  # PCRL's reward of a text from which the reader answers otherwise


class RewardData(QuestionData):
    """The `data` section of a recipe of kind `rewards`.

    Attributes:
        samples: outputs drawn per passage.
        questions_per_passage: questions that the reward is the mean over; a query-aware compressor has one.
        faithful: PCRL's reward: 1 less the share of tokens that stay, if the faithfulness is above this, else -0.01. Without it
            the reward is the faithfulness itself.
        semantic: weight of the cosine between output and passage, beside the faithfulness (Nano-Capsulator).
        entropy: weight of the policy's entropy.
    """

    samples: int = Field(default=4, gt=0)
    questions_per_passage: int = Field(default=2, gt=0)
    faithful: float | None = Field(default=None, gt=0, lt=1)
    semantic: float = Field(default=0.0, ge=0)
    entropy: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class RewardItem:
    """A passage and the questions that its reward comes from."""

    passage: str
    pairs: tuple[tuple[str, str], ...]
    key: str

    @property
    def size(self) -> int:
        """Characters; batches are sorted by it."""
        return len(self.passage)


class Reward:
    """The reward of compressed texts.

    ``faithfulness = min(1, exp(mean log p(answer | text, question) - mean log p(answer | passage, question)))``, the mean over
    the answer's tokens and then over questions, under the reader.

    Args:
        reader: the reader, frozen.
        data: its settings.
    """

    def __init__(self, reader: Reader, data: RewardData) -> None:
        self.reader, self.data = reader, data
        self._embedder = load_embedder(MINILM, reader.device) if data.semantic else None

    @torch.no_grad()
    def faithfulness(self, items: Sequence[RewardItem], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each item and each of its texts, from 0 to 1."""
        jobs = [
            (text + ASKED.format(question=question), f" {answer}")
            for item, several in zip(items, texts)
            for text in (item.passage, *several)
            for question, answer in item.pairs
        ]
        found = self_information(self.reader, [answer for _, answer in jobs], prefixes=[prompt for prompt, _ in jobs])
        losses = iter([float(scores.nll.mean()) for scores in found])
        out = []
        for item, several in zip(items, texts):
            full, *others = [[next(losses) for _ in item.pairs] for _ in range(len(several) + 1)]
            out.append([sum(math.exp(min(0.0, a - b)) for a, b in zip(full, part)) / len(full) for part in others])
        return out

    @torch.no_grad()
    def __call__(self, items: Sequence[RewardItem], texts: Sequence[Sequence[str]]) -> Tensor:
        """``[items, texts]`` rewards."""
        found = torch.tensor(self.faithfulness(items, texts))
        if (threshold := self.data.faithful) is not None:
            return torch.where(found > threshold, 1 - self.shares(items, texts), MISSED)
        if self._embedder is not None:
            passages = self._embedder.means([item.passage for item in items])
            others = self._embedder.means([text for several in texts for text in several]).view(
                len(items), -1, self._embedder.dim
            )
            found = found + self.data.semantic * (others * passages[:, None]).sum(-1)
        return found

    def shares(self, items: Sequence[RewardItem], texts: Sequence[Sequence[str]]) -> Tensor:
        """``[items, texts]`` share of the passage's tokens that stay."""
        whole = [len(self.reader.tokenize(item.passage)) for item in items]
        return torch.tensor(
            [[len(self.reader.tokenize(text)) / max(n, 1) for text in several] for n, several in zip(whole, texts)]
        )


class RewardModule(nn.Module):
    """The self-critical policy gradient: ``-mean((r(drawn) - r(likeliest)) log p(drawn))``, less the weighted entropy."""

    def __init__(self, compressor: Compressor, reward: Reward) -> None:
        super().__init__()
        self.compressor, self.reward = compressor, reward

    def forward(self, items: list[RewardItem], ratio: float | None, seed: int) -> dict[str, Any]:
        """Loss, mean rewards and the share of tokens that stay."""
        samples = self._sample(items, ratio, seed, self.reward.data.samples)
        texts = [[sample.text for sample in several] for several in samples]
        rewards = self.reward(items, texts)
        log_probs = torch.stack([torch.stack([s.log_prob for s in several[1:]]) for several in samples])
        entropy = torch.stack([several[0].entropy for several in samples]).mean()
        gain = (rewards[:, 1:] - rewards[:, :1]).to(log_probs)
        loss = -(gain * log_probs).mean() - self.reward.data.entropy * entropy
        shares = self.reward.shares(items, texts)
        return {
            "loss": loss,
            "reward/drawn": rewards[:, 1:].mean(),
            "reward/likeliest": rewards[:, 0].mean(),
            "share": shares[:, 0].mean(),
            "tokens": sum(len(item.passage) for item in items) // 4,
        }

    def _sample(self, items: Sequence[RewardItem], ratio: float | None, seed: int, count: int) -> list[list[Sample]]:
        asked = [item.pairs[0][0] if self.compressor.query_aware else None for item in items]
        sampler: Any = self.compressor
        return sampler.sample([item.passage for item in items], asked, ratio, count, seed)


class RewardTask:
    """Task of a recipe of kind `rewards`, for `run_recipe`.

    Args:
        recipe: its compressor is a `Sampler`.
        reader: the reader; default: the recipe's own. It is not trained.

    Raises:
        ValueError: if the recipe's reader, data, method or settings cannot be used.
    """

    def __init__(self, recipe: Recipe, reader: Reader | None = None) -> None:
        self.recipe = recipe
        self.data, found = opened(recipe, "rewards", RewardData, reader)
        if not isinstance(found, Sampler):
            raise ValueError(
                f"A recipe of kind 'rewards' trains a compressor that draws its output, and {found.config.method} does not."
            )
        self.compressor: Compressor = found
        self.module = RewardModule(self.compressor, Reward(self.compressor.base_reader, self.data))
        self._material: Material | None = None

    @property
    def material(self) -> Material:
        """Passages with questions, read at first use."""
        if self._material is None:
            self._material = self._passages(self.data.questions)
            if not self._material.asked:
                raise ValueError("data.questions holds no usable question; see max_chars and max_answer_words.")
        return self._material

    def _passages(self, sources: Sequence[str], half: str | None = None) -> Material:
        data = self.data
        shares = data.shares if half is None else None
        return Material(load_records(sources, data.dir, half), [], data.max_chars, data.max_answer_words, True, shares)

    def _item(self, asked: Asked, rng: random.Random, key: str) -> RewardItem:
        count = 1 if self.compressor.query_aware else min(self.data.questions_per_passage, len(asked.pairs))
        return RewardItem(asked.passage, tuple(rng.sample(asked.pairs, count)), key)

    def make(self, key: str) -> RewardItem:
        """The item of a key; equal keys give equal items."""
        rng = random.Random(key)
        return self._item(self.material.human(rng), rng, key)

    def dataset(self, stage: Stage) -> CompressorItems:
        """Items of a stage."""
        return CompressorItems(self.make, self.recipe.seed, stage)  # type: ignore[arg-type,return-value]

    def collator(self, stage: Stage) -> Callable[[list[RewardItem]], dict[str, Any]]:
        """Collates items; the first one seeds the draws and the ratio."""

        def collate(items: list[RewardItem]) -> dict[str, Any]:
            key = items[0].key
            return {"items": items, "ratio": draw_ratio(stage.ratios, key), "seed": random.Random(key).randrange(2**31)}

        return collate

    def begin_stage(self, stage: Stage) -> None:
        """Trains all weights of the compressor."""
        if stage.trainable not in ("all", ["all"]):
            raise ValueError(f"Stage {stage.name!r}: a recipe of kind 'rewards' trains 'all', got {stage.trainable!r}.")
        self.compressor.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """Writes the compressor."""
        self.compressor.save_pretrained(folder, dtype=self.recipe.output.torch_dtype)

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Mean `reward`, `faithfulness` and `share` of the likeliest outputs on `data.dev`."""
        if not self.data.dev:
            raise ValueError(f"Stage {stage.name!r} sets eval_every, which needs data.dev: a question file.")
        held = self._passages([self.data.dev], self.data.dev_half)
        asked = self.data.thinned([one for source in held.asked.values() for one in source])
        items = [self._item(one, random.Random(one.passage), one.passage) for one in asked]
        training = self.compressor.training
        self.compressor.eval()
        samples = self.module._sample(items, draw_ratio(stage.ratios, "dev"), 0, 1)
        self.compressor.train(training)
        texts = [[several[0].text] for several in samples]
        reward = self.module.reward
        figures = {"reward": reward(items, texts), "share": reward.shares(items, texts)}
        figures["faithfulness"] = torch.tensor(reward.faithfulness(items, texts))
        return {name: float(values.mean()) for name, values in figures.items()}
