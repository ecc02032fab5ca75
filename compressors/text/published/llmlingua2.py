"""LLMLingua-2 as published: words above a percentile of their chunk stay.

The computation of arXiv 2403.12968 as its authors' release carries it out, for the ``faithful`` mode. Its peculiarities:

- a long text is cut after the last ``.`` or newline token within the limit, a chunk may be one token longer than the room
  between ``[CLS]`` and ``[SEP]``, which then loses its ``[SEP]``; every chunk is turned into text and tokenised again;
- the strings ``[CLS]`` and ``[SEP]`` stand around every chunk, which an XLM-RoBERTa tokenizer knows as unknown tokens;
- every chunk keeps the same share: the threshold is the percentile ``int(100 * dropped + 1)`` of its word probabilities, a
  word counted as often as it has tokens, and words must lie strictly above it (or have probability 1);
- contexts are chosen by the mean over their words, of which each counts as its first token;
- what a forced token or a digit is worth is 1; words come out through the tokenizer's own joining, so that spaces change.

Not as published: words are counted in the reader's tokens in place of GPT-3.5's (which would be downloaded); a forced token
that is several tokens is refused, as the release gives it an embedding drawn at random; word marks are found in the
tokenizer and not in a folder's name; chunks are not padded to the limit, which changes no probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ...encoders.token_classifier import ClassifierTokenizer
from ...encoders.word_merge import WordPieces, keep_above_percentile


class PublishedWords:
    """The published compression of texts by word probabilities.

    Args:
        pieces: the classifier's tokenizer.
        probabilities: rows of ids to the probability of "keep" of each token.
        count: tokens of a text, as the share is counted.
        limit: the longest row.
        merge: ``"mean"`` or ``"first"``.
        force: tokens that stay.
        digits: tokens with a digit stay.
        drop_consecutive: of forced tokens in a row the first alone stays.
        chunk_ends: tokens after which a chunk may end.

    Raises:
        ValueError: if a forced token is not one token of the classifier, or its tokenizer marks no words.
    """

    def __init__(
        self,
        pieces: ClassifierTokenizer,
        probabilities: Callable[[Sequence[Sequence[int]]], list[Tensor]],
        *,
        count: Callable[[str], int],
        limit: int = 512,
        merge: str = "mean",
        force: Sequence[str] = (),
        digits: bool = False,
        drop_consecutive: bool = False,
        chunk_ends: Sequence[str] = (".", "\n"),
    ) -> None:
        self.pieces, self.probabilities, self.count, self.limit = pieces, probabilities, count, limit
        self.marks = WordPieces(pieces.tokenizer)
        self.merge, self.force, self.digits = merge, frozenset(force), digits
        self.drop_consecutive, self.chunk_ends = drop_consecutive, frozenset(chunk_ends)
        if several := [token for token in force if len(pieces(token).ids) != 1]:
            raise ValueError(
                f"mode='faithful' forces single tokens of the classifier, and {several[0]!r} is none; mode='fast' keeps it."
            )
        self._string: Callable[[list[str]], str] = pieces.tokenizer.convert_tokens_to_string

    def chunks(self, text: str) -> list[str]:
        """The text cut into chunks, as text."""
        tokens, room = self.pieces(text).tokens, self.limit - 2
        out, start = [], 0
        while start + room <= len(tokens) - 1:
            ends = (i for i in range(start + room, start, -1) if tokens[i] in self.chunk_ends)
            end = next(ends, start + room)
            out.append(self._string(tokens[start : end + 1]))
            start = end + 1
        return [*out, self._string(tokens[start:])] if start < len(tokens) else out

    def words(self, chunks: Sequence[str], forced: bool = True) -> list[tuple[list[str], list[float]]]:
        """Each chunk's words and their probabilities; ``forced`` gives forced tokens and digits theirs of 1.

        Without it, for the choice of contexts, a word is worth its first token whatever ``merge`` says, as in the release.
        What the classifier has no token for is its unknown token, and goes with the other special tokens.
        """
        tokenizer = self.pieces.tokenizer
        cls, sep = tokenizer.convert_tokens_to_ids("[CLS]"), tokenizer.convert_tokens_to_ids("[SEP]")
        # Read as the release reads them: a chunk may spell out the unknown token ("[UNK]"), which is that token again.
        read = [tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"] for chunk in chunks]
        rows = [[cls, *ids, sep][: self.limit] for ids in read]
        how = self.merge if forced else "first"
        out = []
        for ids, values in zip(read, self.probabilities(rows)):
            inner = list(values.numpy()[1:][: len(ids)])
            tokens = tokenizer.convert_ids_to_tokens(ids)
            out.append(self.marks.merge(tokens, inner, how, self.force, self.digits, certain=forced))
        return out

    def compress(self, text: str, rate: float) -> str:
        """The text at ``rate`` of its tokens; as it is where the rate is 1 or more."""
        chunks = self.chunks(text)
        if rate >= 1:
            return "".join(chunks)
        out = []
        for words, values in self.words(chunks):
            kept = keep_above_percentile(
                words, values, max(0, 1 - rate), self.count, self.force, drop_consecutive=self.drop_consecutive
            )
            out.append(self._string([word for word, keep in zip(words, kept) if keep]))
        return "".join(out)

    def keep_contexts(self, texts: Sequence[str], share: float) -> list[bool]:
        """Which contexts stay: about this share of them, by the mean probability of their words' first tokens."""
        means = []
        for text in texts:
            values = [value for _, found in self.words(self.chunks(text), forced=False) for value in found]
            means.append(float(sum(values) / len(values)) if values else 0.0)
        if len(means) < 2:
            return [True] * len(means)
        limit = np.percentile(means, int(100 * (1 - share)))
        return [bool(mean >= limit) for mean in means]

    def compress_contexts(self, texts: Sequence[str], rate: float, target: int | None = None) -> list[str | None]:
        """Each context compressed, or ``None`` for one that does not stay.

        Args:
            texts: the contexts.
            rate: of the tokens; ``(rate + 1) / 2`` of the contexts stay.
            target: tokens to keep, in place of a rate; contexts are chosen for twice as many.
        """
        share = (rate + 1) / 2
        if target is not None:
            share = min(2 * target / max(sum(map(self.count, texts)), 1), 1.0)
        kept = self.keep_contexts(texts, share)
        if target is not None:
            left = sum(self.count(chunk) for text, keep in zip(texts, kept) if keep for chunk in self.chunks(text))
            rate = min(target / max(left, 1), 1.0)
        return [self.compress(text, rate) if keep else None for text, keep in zip(texts, kept)]
