"""Language modelling: predict the text that follows the slots."""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from torch import Tensor

from .chunked import ChunkedLoss
from .registry import Objective, Scored, Setup, register_objective


class TokenLoss(ChunkedLoss, Objective):
    """Negative log-likelihood of target tokens.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        chunk: rows whose logits exist at the same time.

    Inputs:
        hidden: ``[N, d]`` hidden state before each target token, slots in the prompt.
        ids: ``[N]`` target tokens.
        weights, num_items: ``[N]`` weights of the rows, default 1; divisor, default the sum of the weights.

    Memory:
        ``12 * min(N, chunk) * V`` bytes besides the inputs and their gradients (float32 logits, log-probabilities,
        gradient), instead of ``12 * N * V``: at V = 128,256 and N = 16,384, 0.8 GB instead of 25 GB.
    """

    @classmethod
    def create(cls, setup: Setup) -> Self:
        return cls(setup.compressor.reader.head)

    def total(self, scored: Scored) -> Tensor:
        return self(scored.hidden, scored.ids, num_items=1)

    def _rows(self, hidden: Tensor, other: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden), other, reduction="none")

    def forward(
        self, hidden: Tensor, ids: Tensor, weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; inputs as in the class."""
        if ids.shape != hidden.shape[:1]:
            raise ValueError(f"ids must hold one token a row, [{hidden.shape[0]}], got {list(ids.shape)}.")
        return self._reduce(hidden, ids, weights, num_items)


@register_objective("lm")
class LanguageModelingLoss(TokenLoss):
    r"""Negative log-likelihood of the text or answer that follows the slots:
    :math:`L_{LM} = -\sum_i \log p(a_i \mid z, q, a_{<i})`.

    The target is the passage's continuation (ICAE) or a paraphrase (xRAG's first stage) in pretraining, the answer to a
    question in instruction tuning. Arguments, inputs and memory: see `TokenLoss`.

    References:
        - Ge et al., arXiv 2307.06945, eq. 3 (continuation).
        - Cheng et al., xRAG: Extreme Context Compression for Retrieval-augmented Generation with One Token,
          arXiv 2405.13792, eq. 2 and 3 (paraphrase, answer).

    Example:
        >>> loss = LanguageModelingLoss(reader.head)
        >>> prompt = [passage, "\n\nQuestion: Who signed it?\nAnswer:"]
        >>> found = reader.target_hidden([prompt], [" The mayor"], add_eos=True)
        >>> loss(found.hidden, found.ids).backward()
    """

    targets = frozenset({"answer", "continuation", "paraphrase"})
