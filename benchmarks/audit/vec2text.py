"""Vec2Text (arXiv 2310.06816): guess, embed the guess, correct it by what is missing, and keep the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ...compressors import CompressedPassage, Reader
from ...compressors.encoders.embedder import Embedder
from ...recipes.tasks.inversion import InversionDecoder
from ..rows import Row
from .attacker import Stolen, register_attacker
from .geia import GEIA, LONGEST
from .transfer import middle


@register_attacker
class Vec2Text(GEIA):
    """Corrects the guesses of a trained decoder with the embedder, which the attacker can query.

    The paper trains a second model on ``(z, f(x), z - f(x), x)`` for the correction. Here the decoder is asked again with the
    vector moved by what the best guess x lacks, ``z + z - f(x)``, and writes several candidates by sampling; the best of all by
    their cosine to z stays. So a guess never becomes worse by that measure.

    Args:
        embedder: the one that made the vectors.
        rounds: most corrections; a passage is left alone once a round gains less than `gain`.
        candidates: sampled in each round.
    """

    name: ClassVar[str] = "vec2text"
    title: ClassVar[str] = "trained decoder, corrected"
    gain = 1e-3

    def __init__(
        self,
        reader: Reader,
        decoder: InversionDecoder | None = None,
        training: Row | None = None,
        embedder: Embedder | None = None,
        rounds: int = 4,
        candidates: int = 4,
    ) -> None:
        super().__init__(reader, decoder, training)
        self.embedder, self.rounds, self.candidates = embedder, rounds, candidates

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return not isinstance(stolen, CompressedPassage)

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """Raises ValueError without decoder and embedder."""
        if self.embedder is None or self.decoder is None:
            raise ValueError(
                "Vec2Text needs a trained decoder and the embedder of the vectors: audit with --embedder NAME."
            )
        vectors = [one for one in stolen if isinstance(one, Tensor)]
        wanted = torch.stack([middle(one) for one in vectors])
        best = super().attack(vectors)
        found = self._embed(best)
        score = cosine_similarity(wanted, found)
        todo = list(range(len(vectors)))
        torch.manual_seed(0)  # of the sampling
        for _ in range(self.rounds):
            moved = [normalize(vectors[i], dim=-1) + wanted[i] - found[i] for i in todo for _ in range(self.candidates)]
            longest = [LONGEST] * len(moved)
            guesses = self.decoder.write(moved, longest, 64, do_sample=True, temperature=0.7, top_p=0.9)
            made = self._embed(guesses).view(len(todo), self.candidates, -1)
            likeness = cosine_similarity(wanted[todo][:, None], made, dim=-1)
            left = []
            for row, i in enumerate(todo):
                pick = int(likeness[row].argmax())
                gained = float(likeness[row, pick] - score[i])
                if gained > 0:
                    best[i], found[i] = guesses[row * self.candidates + pick], made[row, pick]
                    score[i] = likeness[row, pick]
                if gained >= self.gain:
                    left.append(i)
            todo = left
            if not todo:
                break
        return best

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """``[texts, width]`` unit vectors; zeros for a text without words."""
        embedder = self.embedder
        if embedder is None:
            raise ValueError("Vec2Text needs the embedder of the vectors.")
        shards = embedder.embed_shards(texts, embedder.max_tokens, [1] * len(texts))
        return torch.stack([middle(part) if len(part) else part.new_zeros(embedder.dim) for part in shards])
