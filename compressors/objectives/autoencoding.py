"""Autoencoding: repeat the passage from its slots."""

from __future__ import annotations

from .language_modeling import TokenLoss


class AutoencodingLoss(TokenLoss):
    r"""The reader, reading only the slots, must repeat the passage that they were made of:
    :math:`L_{AE} = -\sum_i \log p(t_i \mid z, \text{"repeat"}, t_{<i})`.

    It teaches slots to carry wording. Alone it teaches nothing about using them: give it a small share beside
    `LanguageModelingLoss` or `KLDistillationLoss`.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        chunk: rows whose logits exist at the same time.

    References:
        - Ge et al., In-context Autoencoder for Context Compression in a Large Language Model, arXiv 2307.06945, eq. 2.

    Inputs:
        +-------------+---------------------+------------------------------------------------------------------+
        | hidden      | ``[N, d]`` float    | reader's hidden state before each target token, slots in prompt  |
        | ids         | ``[N]`` int64       | the passage's tokens                                             |
        | weights     | ``[N]`` float, opt. | weight of each row; default 1                                    |
        | num_items   | number, opt.        | divisor; default the sum of the weights                          |
        +-------------+---------------------+------------------------------------------------------------------+

    Memory:
        Beside its inputs and their gradients ``12 * min(N, chunk) * V`` bytes (float32 logits, log-probabilities, gradient)
        in place of ``12 * N * V``: at V = 128,256 and N = 16,384, 0.8 GB instead of 25 GB.

    Example:
        >>> loss = AutoencodingLoss(reader.head)
        >>> found = reader.target_hidden([autoencoding_prompt(p) for p in compressor.encode(texts)], texts)
        >>> loss(found.hidden, found.ids).backward()
    """
