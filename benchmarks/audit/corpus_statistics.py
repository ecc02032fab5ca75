"""The baseline: a guess that knows how often words occur, and nothing of the passage but its length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .scores import words


class CorpusStatistics:
    """Guesses the words that a passage of a given length is expected to hold.

    Of each word as many copies as expected, rounded; the most frequent words first. This is the best guess of a bag of words
    without looking at what is stored.

    Args:
        texts: public text of the same kind. Raises ValueError without any word.
    """

    name = "statistics"
    title = "corpus statistics alone"

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in words(text))
        total = counts.total()
        if not total:
            raise ValueError("The corpus's statistics need public text, got none with words in it.")
        self.shares = [(word, count / total) for word, count in counts.most_common()]

    def guess(self, length: int) -> str:
        """A text of at most `length` words."""
        out: list[str] = []
        for word, share in self.shares:
            copies = round(share * length)
            if not copies or len(out) >= length:
                break
            out += [word] * copies
        return " ".join((out or [self.shares[0][0]])[:length])
