"""The transfer attack: a decoder of another embedder reads vectors through a linear map, learned from a few leaked pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...compressors import CompressedPassage, Reader
from ...compressors.encoders.embedder import Embedder, load_embedder
from ...recipes.tasks.inversion import InversionDecoder
from ..rows import Row
from .attacker import Stolen, register_attacker
from .geia import GEIA
from .targets import Target

RIDGE = 0.01  # times the mean variance of a dimension


@register_attacker
class Transfer(GEIA):
    r"""Maps vectors into the space of a surrogate embedder and decodes them there (arXiv 2406.10280).

    The embedder of the vectors is not known and cannot be queried; some texts have leaked with their vectors. The map is
    linear, :math:`\min_A \sum_i |A v_i - s(x_i)|^2`, in closed form, as in ALGEN (arXiv 2502.11308), instead of that paper's
    adversarial training. So a secret rotation is undone, too.

    Args:
        decoder: trained for the surrogate.
        surrogate: embedder of the decoder's vectors.
    """

    name: ClassVar[str] = "transfer"
    title: ClassVar[str] = "another embedder's decoder"
    of_one_defence: ClassVar[bool] = True

    def __init__(
        self,
        reader: Reader,
        decoder: InversionDecoder | None = None,
        training: Row | None = None,
        surrogate: Embedder | None = None,
    ) -> None:
        super().__init__(reader, decoder, training)
        self.surrogate = surrogate
        self.map: Tensor | None = None  # [width, surrogate's width]

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return not isinstance(stolen, CompressedPassage)

    def learn(self, texts: Sequence[str], target: Target | None = None) -> None:
        """Fit the map to the target's leaked pairs.

        Raises:
            ValueError: without leaked pairs, or without a surrogate.
        """
        if target is None or not target.leaked or self.surrogate is None:
            raise ValueError(
                "The transfer attack needs the decoder of an embedder, and other texts with their vectors."
            )
        x = torch.stack([middle(one) for _, one in target.leaked if isinstance(one, Tensor)])
        y = self.surrogate.means([text for text, _ in target.leaked])
        square = x.T @ x
        size = RIDGE * square.diagonal().mean()
        self.map = torch.linalg.solve(square + size * torch.eye(len(square)), x.T @ y)
        self.about = self.about | {"leaked_pairs": len(x), "surrogate": self.surrogate.name}

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """Raises ValueError before `learn`."""
        if self.map is None:
            raise ValueError("The transfer attack learns from leaked pairs first: call learn(texts, target).")
        return super().attack(
            [normalize(middle(one) @ self.map, dim=-1)[None] for one in stolen if isinstance(one, Tensor)]
        )


def middle(shards: Tensor) -> Tensor:
    """Unit vector of a passage: that of its shards' mean."""
    return normalize(shards.float().mean(0), dim=-1)


def transferred(reader: Reader, folders: Sequence[str]) -> Transfer | None:
    """The attacker with the first decoder of vectors among some folders; None if there is none."""
    for folder in folders:
        decoder = InversionDecoder.from_pretrained(folder, reader)
        if decoder.settings.embedder is not None:
            return Transfer(reader, decoder, surrogate=load_embedder(decoder.settings.embedder))
    return None
