"""LLMLingua-2 as released (arXiv 2403.12968): keeps the words above a percentile of their chunk.

Known properties of the release, which are kept:

- A long text is cut after the last ``.`` or newline token within the limit. A chunk may be one token longer than the room
  between ``[CLS]`` and ``[SEP]`` and then loses its ``[SEP]``. Each chunk is decoded and tokenised again.
- The strings ``[CLS]`` and ``[SEP]`` surround each chunk; an XLM-RoBERTa tokenizer reads them as unknown tokens.
- Each chunk keeps the same share: the threshold is percentile ``int(100 * dropped + 1)`` of its word probabilities, a word
  counted once per token. Words must lie strictly above it (or have probability 1).
- Contexts are chosen by the mean over their words, each counted by its first token.
- Forced tokens and digits have probability 1. Words are joined by the tokenizer, so spaces change.

Differences: words are counted in the reader's tokens, not GPT-3.5's; a forced string of several tokens is refused (the
release gives it a random embedding); word marks come from the tokenizer, not from a folder's name; chunks are not padded.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...core.config import CompressorConfig
from ...core.textfiles import check_strings
from ...encoders.token_classifier import TokenClassifier
from .llmlingua import check_indices

_DIGIT = re.compile(r"\d")


@dataclass
class LLMLingua2Options(CompressorConfig):
    """Options of LLMLingua-2's ``mode="published"``."""

    method: ClassVar[str] = "llmlingua2"

    drop_consecutive: bool = field(
        default=False, metadata={"help": "of adjacent forced tokens only the first stays (published)"}
    )
    chunk_ends: tuple[str, ...] = field(
        default=(".", "\n"), metadata={"help": "tokens after which a long text may be cut (published)"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.chunk_ends, str) or self.chunk_ends is None:
            raise ValueError(f"chunk_ends must be a list of strings, got {self.chunk_ends!r}.")
        self.chunk_ends = tuple(self.chunk_ends)


class PublishedWords:
    """The released compression by word probabilities.

    Args:
        words: the classifier.
        options: see the class.
        count: tokens of a text, in which shares are counted.
        force: tokens that stay.
        digits: tokens with a digit stay.

    Raises:
        ValueError: if a forced string is not one token of the classifier, or its tokenizer does not mark words.
    """

    def __init__(
        self,
        words: TokenClassifier,
        options: LLMLingua2Options,
        *,
        count: Callable[[str], int],
        force: Sequence[str] = (),
        digits: bool = False,
    ) -> None:
        self.classifier, self.options, self.count = words, options, count
        self.pieces, self.limit, self.merge = words.pieces, words.limit, words.merge
        self.marks = WordPieces(self.pieces.tokenizer)
        self.force, self.digits = frozenset(check_strings("force", force)), digits
        if several := [token for token in self.force if len(self.pieces(token).ids) != 1]:
            raise ValueError(
                f"mode='published' forces single tokens of the classifier, and {several[0]!r} is none; use mode='fast'."
            )
        self._string: Callable[[list[str]], str] = self.pieces.tokenizer.convert_tokens_to_string

    def chunks(self, text: str) -> list[str]:
        """Cuts the text into chunks, as text."""
        tokens, room = self.pieces(text).tokens, self.limit - 2
        out, start = [], 0
        while start + room <= len(tokens) - 1:
            ends = (i for i in range(start + room, start, -1) if tokens[i] in self.options.chunk_ends)
            end = next(ends, start + room)
            out.append(self._string(tokens[start : end + 1]))
            start = end + 1
        return [*out, self._string(tokens[start:])] if start < len(tokens) else out

    def words(self, chunks: Sequence[str], forced: bool = True) -> list[tuple[list[str], list[float]]]:
        """The words of each chunk and their probabilities; ``forced`` sets forced tokens and digits to 1.

        Without ``forced``, to choose contexts, a word counts by its first token whatever ``merge`` says, as in the release.
        Unknown tokens are left out with the other special tokens.
        """
        tokenizer = self.pieces.tokenizer
        cls, sep = tokenizer.convert_tokens_to_ids("[CLS]"), tokenizer.convert_tokens_to_ids("[SEP]")
        # As the release reads them: "[UNK]" spelled out in a chunk is the unknown token again.
        read = [tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"] for chunk in chunks]
        rows = [[cls, *ids, sep][: self.limit] for ids in read]
        how = self.merge if forced else "first"
        out = []
        for ids, values in zip(read, self.classifier.row_probabilities(rows)):
            inner = list(values.numpy()[1:][: len(ids)])
            tokens = tokenizer.convert_ids_to_tokens(ids)
            out.append(self.marks.merge(tokens, inner, how, self.force, self.digits, certain=forced))
        return out

    def compress(self, text: str, rate: float) -> str:
        """Compresses the text to ``rate`` of its tokens; a rate of 1 or more keeps all chunks."""
        chunks = self.chunks(text)
        if rate >= 1:
            return "".join(chunks)
        out = []
        for words, values in self.words(chunks):
            kept = keep_above_percentile(
                words, values, max(0, 1 - rate), self.count, self.force, self.options.drop_consecutive
            )
            out.append(self._string([word for word, keep in zip(words, kept) if keep]))
        return "".join(out)

    def keep_contexts(self, texts: Sequence[str], share: float, forced: Sequence[int] = ()) -> list[bool]:
        """Keeps about this share of the contexts, by the mean probability of their words' first tokens, and forced ones."""
        means = []
        for text in check_strings("texts", texts, "contexts"):
            values = [value for _, found in self.words(self.chunks(text), forced=False) for value in found]
            means.append(float(sum(values) / len(values)) if values else 0.0)
        if len(means) < 2:
            return [True] * len(means)
        limit = np.percentile(means, int(100 * (1 - share)))
        return [bool(mean >= limit) or i in forced for i, mean in enumerate(means)]

    def compress_contexts(
        self,
        texts: Sequence[str],
        rate: float = 0.5,
        *,
        target_tokens: int | None = None,
        target_contexts: int | None = None,
        forced: Sequence[int] = (),
        token_filter: bool = True,
    ) -> list[str | None]:
        """Compresses each context; ``None`` for a context that is dropped.

        Args:
            texts: the contexts.
            rate: of the tokens; ``(rate + 1) / 2`` of the contexts stay.
            target_tokens: the reader's tokens to keep, instead of a rate; contexts are chosen for twice as many.
            target_contexts: how many contexts to keep (ties may keep more), instead of those shares.
            forced: indices of contexts that stay whatever they are worth.
            token_filter: drop words of the contexts that stay. Without it contexts are chosen for the rate or target itself.

        Raises:
            ValueError: if a target is not an integer of at least 1, or an index is none.
        """
        for name, target in (("target_tokens", target_tokens), ("target_contexts", target_contexts)):
            if target is not None and (not isinstance(target, int) or isinstance(target, bool) or target < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {target!r}.")
        texts = check_strings("texts", texts, "contexts")
        check_indices("forced", forced, len(texts))
        share = (rate + 1) / 2 if token_filter else rate
        if target_tokens is not None:
            room = target_tokens * (2 if token_filter else 1)
            share = min(room / max(sum(map(self.count, texts)), 1), 1.0)
        if target_contexts is not None:
            share = min(target_contexts / max(len(texts), 1), 1.0)
        kept = self.keep_contexts(texts, share, forced)
        if not token_filter:
            rate, target_tokens = 1.0, None
        if target_tokens is not None:
            left = sum(self.count(chunk) for text, keep in zip(texts, kept) if keep for chunk in self.chunks(text))
            rate = min(target_tokens / max(left, 1), 1.0)
        return [self.compress(text, rate) if keep else None for text, keep in zip(texts, kept)]


class WordPieces:
    """Joins a tokenizer's pieces into words: ``##`` marks a continuation (BERT), or ``▁`` a beginning (XLM-RoBERTa).

    Raises:
        ValueError: if the tokenizer uses neither mark.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        marked = {
            mark: sum(token.startswith(mark) and len(token) > len(mark) for token in vocabulary) for mark in ("##", "▁")
        }
        self.mark = max(marked, key=lambda mark: marked[mark])
        if not marked[self.mark]:
            raise ValueError(
                "mode='published' joins word pieces by '##' or '▁', and this tokenizer marks them in neither way; use "
                "mode='fast', which joins them by their characters."
            )
        self.specials = {v for v in tokenizer.special_tokens_map.values() if isinstance(v, str)}

    def begins(self, token: str, force: Collection[str]) -> bool:
        """Whether a piece begins a word; punctuation (with ``▁``) and forced tokens always do."""
        if self.mark == "##":
            return self.bare(token) in force or not token.startswith("##")
        return token in string.punctuation or token in force or token.startswith("▁")

    def bare(self, token: str) -> str:
        """The piece without any leading ``#`` or ``▁``."""
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
        """Words and their probabilities, without special tokens.

        Args:
            tokens, values: pieces and their probabilities.
            how: ``"mean"`` or ``"first"``.
            force: pieces that are words of their own, with probability 1.
            digits: pieces with a digit have probability 1.
            certain: ``False`` keeps the found probabilities but cuts the same words.
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
        return words, [part[0] if how == "first" else sum(part) / len(part) for part in parts]


def keep_above_percentile(
    words: Sequence[str],
    values: Sequence[Any],
    share: float,
    count: Callable[[str], int],
    force: Collection[str] = (),
    drop_consecutive: bool = False,
) -> list[bool]:
    """Keeps the words of a chunk strictly above percentile ``int(100 * share + 1)``, words weighted by tokens.

    Args:
        words, values: words and their probabilities.
        share: of the tokens, to drop.
        count: tokens of a word.
        force: forced tokens.
        drop_consecutive: of forced tokens with nothing kept between them only the first stays.
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
