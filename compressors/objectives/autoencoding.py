"""Autoencoding: predict the passage from its slots."""

from __future__ import annotations

from .language_modeling import TokenLoss
from .registry import register_objective


@register_objective("ae")
class AutoencodingLoss(TokenLoss):
    r"""Negative log-likelihood of the passage's own tokens after its slots:
    :math:`L_{AE} = -\sum_i \log p(t_i \mid z, \text{"repeat"}, t_{<i})`.

    Teaches slots to carry wording, but not to use them: combine it, at a small weight, with `LanguageModelingLoss` or
    `KLDistillationLoss`. Arguments, inputs and memory: see `TokenLoss`.

    References:
        - Ge et al., In-context Autoencoder for Context Compression in a Large Language Model, arXiv 2307.06945, eq. 2.

    Example:
        >>> loss = AutoencodingLoss(reader.head)
        >>> found = reader.target_hidden([autoencoding_prompt(p) for p in compressor.encode(texts)], texts)
        >>> loss(found.hidden, found.ids).backward()
    """

    targets = frozenset({"passage"})
