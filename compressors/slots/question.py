"""Query-aware compression: the encoder reads the question before the passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.config import CompressorConfig, added
from ..reader.tokenization import PromptTokenizer

QUESTION = "Question: {query}\n\n"  # read between BOS and the passage


@dataclass(kw_only=True)
class QuerySettings:
    """Config mixin: whether the encoder reads the question.

    The encoder then reads ``[BOS][question][passage]`` (as OSCAR does, arXiv 2504.07109), so that the slots can hold what the
    question asks for. The cost: every passage is compressed per question, and nothing can be compressed ahead.
    """

    query_aware: bool = added(
        False,
        "read the question before each passage, so that the slots can hold what it asks for; compress() then needs query=...",
    )

    def check_query(self) -> None:
        """Raises ``ValueError`` unless the setting is true or false."""
        if not isinstance(self.query_aware, bool):
            raise ValueError(f"query_aware must be true or false, got {self.query_aware!r}.")


def question_ids(
    config: CompressorConfig, tokenizer: PromptTokenizer, queries: Sequence[str | None]
) -> list[list[int]]:
    """Token ids of each passage's question as the encoder reads it; empty without a question or query awareness."""
    if not getattr(config, "query_aware", False):
        return [[] for _ in queries]
    asked = list(dict.fromkeys(query for query in queries if query))
    found = dict(zip(asked, tokenizer.encode_batch([(QUESTION.format(query=query), False) for query in asked])))
    return [list(found[query]) if query else [] for query in queries]
