"""Probabilities of word pieces merged into those of words."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MERGES = ("mean", "first")
_DIGIT = re.compile(r"\d")


def spread_over_words(values: Tensor, words: Sequence[int | None], how: str = "mean") -> Tensor:
    """Gives every token the value of its word.

    Args:
        values: ``[tokens]``.
        words: for each token the number of its word, as a fast tokenizer counts them; ``None``: a word of its own.
        how: a word's value is the ``"mean"`` of its tokens' values, or that of its ``"first"`` token.

    Returns:
        ``[tokens]``.

    Raises:
        ValueError: for any other ``how``, or if the lengths differ.
    """
    if how not in MERGES:
        raise ValueError(f"Word pieces are merged by one of {MERGES}, got {how!r}.")
    if len(words) != len(values):
        raise ValueError(f"One word number a token is needed: got {len(words)} for {len(values)} tokens.")
    if not len(values):
        return values
    runs: list[int] = []
    for i, word in enumerate(words):
        new = i == 0 or word is None or word != words[i - 1]
        runs.append((runs[-1] if runs else -1) + new)
    index = torch.tensor(runs)
    if how == "first":
        first = torch.tensor([i for i, run in enumerate(runs) if i == 0 or run != runs[i - 1]])
        return values[first][index]
    sums = torch.zeros(runs[-1] + 1, dtype=values.dtype).index_add_(0, index, values)
    return (sums / torch.bincount(index))[index]


# -- as published ----------------------------------------------------------------------------------------------------------


class WordPieces:
    """How a tokenizer's pieces begin words: ``##`` marks a continuation (BERT), or ``▁`` a beginning (XLM-RoBERTa).

    Raises:
        ValueError: if the tokenizer marks words in neither way, which the published merging needs.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        marked = {
            mark: sum(token.startswith(mark) and len(token) > len(mark) for token in vocabulary) for mark in ("##", "▁")
        }
        self.mark = max(marked, key=lambda mark: marked[mark])
        if not marked[self.mark]:
            raise ValueError(
                "mode='faithful' merges word pieces by '##' or '▁', and this tokenizer marks them in neither way; "
                "mode='fast' merges them by their characters."
            )
        self.specials = {v for v in tokenizer.special_tokens_map.values() if isinstance(v, str)}

    def begins(self, token: str, force: Collection[str]) -> bool:
        """Whether a piece begins a word; punctuation (with ``▁``) and forced tokens always do."""
        if self.mark == "##":
            return self.bare(token) in force or not token.startswith("##")
        return token in string.punctuation or token in force or token.startswith("▁")

    def bare(self, token: str) -> str:
        """The piece without its mark: every leading ``#`` or ``▁`` goes."""
        return token.lstrip(self.mark[0])

    def merge(
        self,
        tokens: Sequence[str],
        values: Sequence[Any],
        how: str = "mean",
        force: Collection[str] = (),
        digits: bool = False,
        certain: bool = True,
    ) -> tuple[list[str], list[Any]]:
        """Words and their probabilities; special tokens are left out.

        Args:
            tokens, values: pieces and their probabilities.
            how: ``"mean"`` or ``"first"``.
            force: pieces that are words of their own, with probability 1.
            digits: pieces with a digit have probability 1.
            certain: give these their 1; else words are cut as they are with it, and every probability is the one found.
        """
        words: list[str] = []
        parts: list[list[Any]] = []
        for token, value in zip(tokens, values):
            if token in self.specials:
                continue
            sure = 1.0 if certain and digits and _DIGIT.search(token) else value
            if not words or self.begins(token, force):
                parts.append([1.0 if certain and self.bare(token) in force else sure])
                words.append(token)
            else:
                parts[-1].append(sure)
                words[-1] += self.bare(token)
        if how == "first":
            return words, [part[0] for part in parts]
        return words, [sum(part) / len(part) for part in parts]


def keep_above_percentile(
    words: Sequence[str],
    values: Sequence[Any],
    share: float,
    count: Callable[[str], int],
    force: Collection[str] = (),
    drop_consecutive: bool = False,
) -> list[bool]:
    """Which words of one chunk stay: those strictly above the percentile ``int(100 * share + 1)``, words weighted by tokens.

    Args:
        words, values: words and their probabilities.
        share: of the tokens, to be dropped.
        count: tokens of a word.
        force: forced tokens.
        drop_consecutive: of forced tokens with nothing kept between them the first alone stays.
    """
    values = list(values)
    if not words:
        return []
    if drop_consecutive:
        limit = np.percentile(values, int(100 * share))
        between, previous = False, None
        for i, word in enumerate(words):
            if word not in force:
                between = between or values[i] > limit
                continue
            if not between and word == previous:
                values[i] = 0.0
            between, previous = False, word
    weighted = [value for word, value in zip(words, values) for _ in range(count(word))]
    limit = np.percentile(weighted or values, min(int(100 * share + 1), 100))
    kept: list[bool] = []
    last = None
    for word, value in zip(words, values):
        keep = bool(value > limit or (limit == 1.0 and value == limit))
        if keep and drop_consecutive and word in force and word == last:
            keep = False
        if keep:
            last = word
        kept.append(keep)
    return kept
