"""LLMLingua-2: keeps the words that a token classifier finds worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..core.config import CompressorConfig, added
from ..core.keep import KINDS
from ..core.units import Span
from ..encoders.token_classifier import (
    TokenClassifier,
    TokenClassifierSettings,
    load_classifier,
    spread_over_words,
)
from ..reader.reader import Reader
from ..registry import register_compressor
from .budget import kept_share
from .published.llmlingua2 import LLMLingua2Options, PublishedWords
from .scoring import TokenScores
from .selection import SelectingCompressor, SelectionConfig

CLASSIFIER_FOLDER = "classifier"  # in the folder of an imported compressor: its classifier


@dataclass
class LLMLingua2Config(SelectionConfig, TokenClassifierSettings):
    """Settings of LLMLingua-2. The paper's force tokens are ``keep``, its reserved digits ``keep_digits``."""

    method: ClassVar[str] = "llmlingua2"
    title: ClassVar[str] = "LLMLingua-2"
    options_class: ClassVar[type[CompressorConfig] | None] = LLMLingua2Options

    unit: str = field(default="word", metadata={"help": "kept or dropped as a whole"})
    classifier: str | None = field(
        default=None,
        metadata={
            "help": "hub id or folder of a token-classification model; default: encoder, LoRA and a trained head"
        },
    )
    query_aware: bool = added(False, "the classifier reads the question before the passage")
    published: LLMLingua2Options = field(
        default_factory=LLMLingua2Options, kw_only=True, metadata={"help": "options of mode 'published' alone"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_classifier()
        if self.mode == "published" and (kinds := sorted(KINDS.keys() & set(self.keep))):
            raise ValueError(
                f"mode='published' forces single tokens of the classifier and knows no kinds, got {', '.join(kinds)}; use "
                "mode='fast', or keep_digits for numbers."
            )
        if self.query_aware and self.mode == "published":
            raise ValueError(
                "mode='published' is the released LLMLingua-2, which knows no question: set query_aware=False."
            )


@register_compressor
class LLMLingua2Compressor(SelectingCompressor):
    """Keeps the words that a token classifier finds worth keeping (LLMLingua-2, arXiv 2403.12968).

    The classifier is a token-classification model with label 1 for "keep" (``classifier``), or a frozen encoder with LoRA
    and a head, which training changes and `save_pretrained` saves (a few hundred kB).

    ``mode="fast"``: words compete over the whole passage for an exact budget in the reader's tokens. With ``query_aware``
    words are kept for a question, and each question needs a new compression; otherwise questions are ignored.

    ``mode="published"``: the released threshold per chunk. A result may exceed its budget, a short text may become empty, a
    number may be divided, and spaces are those of the classifier's tokenizer. ``published.compress_contexts`` runs it on a
    list of contexts and drops some.

    Args:
        config: the settings.
        reader: the reader; the budget counts its tokens.
        classifier: ``(model, tokenizer)`` of a token classifier, instead of loading ``config.classifier``.

    Attributes:
        words: the `TokenClassifier`.

    Raises:
        ValueError: if the classifier or encoder cannot be loaded, or is not the one of training.
    """

    config_class: ClassVar[type[CompressorConfig]] = LLMLingua2Config
    config: LLMLingua2Config

    def __init__(self, config: LLMLingua2Config, reader: Reader, *, classifier: tuple[Any, Any] | None = None) -> None:
        super().__init__(config, reader)
        self.words = TokenClassifier(
            config, reader.device, name=config.classifier, model=classifier, query_aware=config.query_aware
        )
        self.config = replace(config, frozen_hash=self.words.frozen_hash)

    @classmethod
    def from_pretrained(cls, folder: str | Path, reader: Reader, **kwargs: Any) -> LLMLingua2Compressor:
        """Loads a saved compressor; a classifier in the folder is used."""
        own = Path(folder) / CLASSIFIER_FOLDER
        if own.is_dir():
            kwargs.setdefault("classifier", load_classifier(own, str(reader.device)))
        return super().from_pretrained(folder, reader, **kwargs)

    def trainable_state(self) -> dict[str, Tensor]:
        """LoRA and head, under the names that checkpoints have."""
        return dict(self.words.named_parameters())

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """For each token (of the classifier) its word's probability of being worth keeping.

        Args:
            texts: the passages.
            queries: one question per passage, read with ``query_aware`` alone.
        """
        return [
            TokenScores(pieces.ids, pieces.offsets, spread_over_words(values, pieces.word_ids, self.config.merge))
            for pieces, values in self.words.probabilities(texts, queries)
        ]

    @cached_property
    def published(self) -> PublishedWords:
        """The released algorithm with this compressor's classifier; ``compress_contexts`` runs it on a list of contexts."""
        config = self.config
        return PublishedWords(
            self.words,
            config.published,
            count=lambda text: self._counts([text])[0],
            force=config.keep,
            digits=config.keep_digits,
        )

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """The released algorithm on one passage."""
        published = self.published
        rate = kept_share(ratio)
        if target_tokens is not None:
            rate = min(target_tokens / max(published.count(text), 1), 1.0)
        return published.compress(text, rate), ()
