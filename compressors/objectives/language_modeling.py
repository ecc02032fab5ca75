"""Language modelling: predict the text that follows the slots."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .chunked import ChunkedLoss


class TokenLoss(ChunkedLoss):
    """Negative log-likelihood of the target tokens."""

    def _rows(self, hidden: Tensor, other: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden), other, reduction="none")

    def forward(
        self, hidden: Tensor, ids: Tensor, weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The objective, a scalar; see the class."""
        if ids.shape != hidden.shape[:1]:
            raise ValueError(f"ids must hold one token a row, [{hidden.shape[0]}], got {list(ids.shape)}.")
        return self._reduce(hidden, ids, weights, num_items)


class LanguageModelingLoss(TokenLoss):
    r"""The reader, reading the slots in place of the passage, must go on as the text or the answer goes on:
    :math:`L_{LM} = -\sum_i \log p(a_i \mid z, q, a_{<i})`.

    In pretraining the target is the continuation of the passage (ICAE) or a paraphrase of it (xRAG's first stage); in
    instruction tuning it is the answer to a question.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        chunk: rows whose logits exist at the same time.

    References:
        - Ge et al., arXiv 2307.06945, eq. 3 (continuation).
        - Cheng et al., xRAG: Extreme Context Compression for Retrieval-augmented Generation with One Token,
          arXiv 2405.13792, eq. 2 and 3 (paraphrase, answer).

    Inputs:
        +-------------+---------------------+------------------------------------------------------------------+
        | hidden      | ``[N, d]`` float    | reader's hidden state before each target token, slots in prompt  |
        | ids         | ``[N]`` int64       | the continuation's or answer's tokens                            |
        | weights     | ``[N]`` float, opt. | weight of each row; default 1                                    |
        | num_items   | number, opt.        | divisor; default the sum of the weights                          |
        +-------------+---------------------+------------------------------------------------------------------+

    Memory:
        As `AutoencodingLoss`: ``12 * min(N, chunk) * V`` bytes at the most.

    Example:
        >>> loss = LanguageModelingLoss(reader.head)
        >>> prompt = [passage, "\n\nQuestion: Who signed it?\nAnswer:"]
        >>> found = reader.target_hidden([prompt], [" The mayor"], add_eos=True)
        >>> loss(found.hidden, found.ids).backward()
    """
