"""Attribute inference: which words a passage holds, by a linear probe (Song and Raghunathan, arXiv 2004.00053, section 4.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...compressors import CompressedPassage, Reader
from .attacker import Attacker, Stolen, register_attacker
from .scores import words
from .targets import Target, steal

TEXTS = 2000  # public passages that are compressed for the probe
OFTEN = 3  # public passages that must hold a word
RIDGE = 0.1  # times the mean variance of a feature


@register_attacker
class BagOfWords(Attacker):
    """Ridge regression from a vector, or the mean of the slots, to the counts of words, in closed form.

    It writes the words with the largest expected counts, without order, as many as the passage has. With nothing to learn from
    the features it writes what the corpus's statistics say.
    """

    name: ClassVar[str] = "bag-of-words"
    title: ClassVar[str] = "linear probe for words"
    of_one_target: ClassVar[bool] = True

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.weights: Tensor | None = None  # [width + 1, words]
        self.vocabulary: list[str] = []
        self.length = 0.0  # words of a passage, per token where that is known

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return not isinstance(stolen, CompressedPassage) or stolen.interface == "embeds"

    def learn(self, texts: Sequence[str], target: Target | None = None) -> None:
        """Compress public text as the target's was, and fit the probe. Nothing is learned without the target's compressor."""
        if target is None or target.victim is None:
            return
        texts = list(texts)[:TEXTS]
        made = steal(target, texts)
        counts = [Counter(words(text)) for text in texts]
        seen = Counter(word for found in counts for word in found)
        self.vocabulary = [word for word, n in seen.most_common() if n >= min(OFTEN, len(texts))]
        place = {word: i for i, word in enumerate(self.vocabulary)}
        y = torch.zeros(len(texts), len(place))
        for row, found in zip(y, counts):
            for word, n in found.items():
                if word in place:
                    row[place[word]] = n
        x = torch.stack([feature(one) for one in made])
        middle, mean = x.mean(0), y.mean(0)
        x = x - middle
        square = x.T @ x
        size = square.diagonal().mean() * RIDGE + 1e-6
        weights = torch.linalg.solve(square + size * torch.eye(len(square)), x.T @ (y - mean))
        self.weights = torch.cat([weights, (mean - middle @ weights)[None]])
        lengths = [found.total() / measure(one) for found, one in zip(counts, made)]
        self.length = sum(lengths) / len(lengths)

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """Raises ValueError before `learn`."""
        if self.weights is None:
            raise ValueError(
                "The probe learns from public text that is compressed alike; audit the compressor, not a store."
            )
        return [self._write(one, self.weights) for one in stolen]

    def _write(self, one: Stolen, weights: Tensor) -> str:
        expected = feature(one) @ weights[:-1] + weights[-1]
        left = round(self.length * measure(one))
        out: list[str] = []
        for i in expected.argsort(descending=True).tolist():
            if left <= 0:
                break
            copies = min(max(round(float(expected[i])), 1), left)
            out += [self.vocabulary[i]] * copies
            left -= copies
        return " ".join(out)


def feature(one: Stolen) -> Tensor:
    """``[width]``: the mean of the shards or slots; zeros without any."""
    rows: Any = one.embeds if isinstance(one, CompressedPassage) else one
    rows = rows.float().cpu()
    return rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])


def measure(one: Stolen) -> int:
    """What a passage's length is counted in: its tokens, or one for a vector."""
    return max(1, one.source_tokens) if isinstance(one, CompressedPassage) else 1
