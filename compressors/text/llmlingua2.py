"""LLMLingua-2: a token classifier says what is worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.config import CompressorConfig, added, check_counts, check_queries
from ..core.fingerprint import hash_json
from ..core.passage import CompressedPassage
from ..encoders.embedder import MINILM
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.token_classifier import (
    ClassifierTokenizer,
    LoRATagger,
    Pieces,
    check_classifier,
    cut,
    load_classifier,
    load_encoder,
    position_limit,
    row_probabilities,
    weights_hash,
)
from ..encoders.word_merge import MERGES, spread_over_words
from ..reader.reader import Reader
from ..registry import register_compressor
from .published.llmlingua2 import PublishedWords
from .scoring import TokenScores
from .selection import SelectingCompressor, SelectionConfig
from .shares import kept_share

CLASSIFIER_FOLDER = "classifier"  # beside an imported compressor: the classifier that came with it


@dataclass
class LLMLingua2Config(SelectionConfig, LoRASettings):
    """Settings of LLMLingua-2. Force tokens are ``keep``, reserved digits ``keep_digits``."""

    method: ClassVar[str] = "llmlingua2"

    unit: str = field(default="word", metadata={"help": "what is kept or dropped whole"})
    mode: Literal["fast", "faithful"] = field(
        default="fast",
        metadata={"help": "'fast': exact budget over the whole passage; 'faithful': the published threshold per chunk"},
    )
    classifier: str | None = field(
        default=None,
        metadata={
            "help": "hub id or folder of a token-classification model; default: encoder, LoRA and a trained head"
        },
    )
    encoder: str = field(default=MINILM, metadata={"help": "the frozen encoder below LoRA and head"})
    frozen_hash: str | None = field(
        default=None,
        metadata={"help": "hash of the frozen weights and tokenizer; filled in when the compressor is made"},
    )
    merge: Literal["mean", "first"] = field(
        default="mean", metadata={"help": "a word's probability: the mean of its tokens', or that of its first"}
    )
    window: int = field(
        default=512, metadata={"help": "longest row that the classifier reads, special tokens included"}
    )
    drop_consecutive: bool = field(
        default=False, metadata={"help": "of forced tokens in a row the first alone stays (faithful)"}
    )
    chunk_ends: tuple[str, ...] = field(
        default=(".", "\n"), metadata={"help": "tokens after which a long text may be cut (faithful)"}
    )
    r: int = lora_rank(16)
    query_aware: bool = added(
        False, "the classifier reads the question in front of the passage and says what is worth keeping for it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("fast", "faithful"):
            raise ValueError(f"mode must be 'fast' or 'faithful', got {self.mode!r}.")
        if self.query_aware and self.mode == "faithful":
            raise ValueError(
                "mode='faithful' is the published LLMLingua-2, which knows no question: set query_aware=False."
            )
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {MERGES}, got {self.merge!r}.")
        check_counts(self, {"window": 8})
        self.check_lora()
        if isinstance(self.chunk_ends, str) or self.chunk_ends is None:
            raise ValueError(f"chunk_ends must be a list of strings, got {self.chunk_ends!r}.")
        self.chunk_ends = tuple(self.chunk_ends)


@register_compressor
class LLMLingua2Compressor(SelectingCompressor):
    """Keeps the words that a token classifier finds worth keeping (LLMLingua-2, arXiv 2403.12968).

    The classifier is any token-classification model whose label 1 is "keep" (``classifier``), or a frozen encoder with
    LoRA and a head of two labels, which are what training changes and what is saved (a few hundred kB).

    ``mode="fast"``: a passage is read in rows cut at sentence ends, each token once, rows of like length together; a
    word's probability is the mean (or first) of its tokens'; words compete over the whole passage for an exact budget in
    the reader's tokens. ``keep`` are the paper's force tokens and ``keep_digits`` its reserved digits.

    ``mode="faithful"``: the published threshold per chunk (see `word_threshold`); a result may exceed its budget, and
    spaces are the classifier tokenizer's, not the text's. `compress_contexts` runs it over a list of contexts, of which
    some are dropped.

    Questions are ignored, but with ``query_aware``: then the classifier reads each row behind the question (``[CLS] question
    [SEP] passage [SEP]`` in BERT's terms), as pruners for RAG do (Provence, arXiv 2501.16214), and words are kept for that
    question. The passage must then be compressed anew for every question.

    Args:
        config: the settings.
        reader: the reader; its tokens are what the budget counts.
        classifier: ``(model, tokenizer)`` of a token classifier in place of loading ``config.classifier``.

    Attributes:
        tagger: the trained `LoRATagger`, or ``None`` beside a classifier of its own.
        pieces: the classifier's tokenizer.
        limit: the longest row it reads, special tokens included.

    Raises:
        ValueError: if the classifier or encoder cannot be loaded or is not the one that was trained with.
    """

    config_class: ClassVar[type[CompressorConfig]] = LLMLingua2Config
    config: LLMLingua2Config

    def __init__(self, config: LLMLingua2Config, reader: Reader, *, classifier: tuple[Any, Any] | None = None) -> None:
        super().__init__(config, reader)
        device = str(reader.device)
        self.tagger: LoRATagger | None = None
        if classifier is not None:
            frozen, tokenizer = check_classifier(*classifier)
        elif config.classifier is not None:
            frozen, tokenizer = load_classifier(config.classifier, device)
        else:
            frozen, tokenizer = load_encoder(config.encoder, device)
            self.tagger = LoRATagger(frozen, **config.lora)
        self._frozen = (frozen,)  # a tuple, as for the reader: held, not owned
        self.pieces = ClassifierTokenizer(tokenizer)
        self.limit = min(config.window, position_limit(frozen, tokenizer))
        found = hash_json(weights_hash(frozen), self.pieces.fingerprint_parts())
        if config.frozen_hash not in (None, found):
            raise ValueError(
                f"The classifier's frozen weights ({found}) are not those that this LLMLingua-2 was made with "
                f"({config.frozen_hash}); load the same encoder or classifier, as "
                "classifier=(model, tokenizer) if it was given so."
            )
        self.config = replace(config, frozen_hash=found)

    @classmethod
    def from_pretrained(cls, folder: str | Path, reader: Reader, **kwargs: Any) -> LLMLingua2Compressor:
        """As every compressor; a classifier that lies in the folder is taken from there."""
        own = Path(folder) / CLASSIFIER_FOLDER
        if own.is_dir():
            kwargs.setdefault("classifier", load_classifier(own, str(reader.device)))
        return super().from_pretrained(folder, reader, **kwargs)

    @property
    def classifier(self) -> tuple[Any, Any]:
        """The frozen classifier or encoder, and its tokenizer."""
        return self._frozen[0], self.pieces.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the classifier runs."""
        return next(self._frozen[0].parameters()).device

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[batch, time, labels]`` for ids and mask ``[batch, time]``; differentiable in LoRA and head. Label 1 is "keep"."""
        if self.tagger is not None:
            return self.tagger(ids, mask)
        return self._frozen[0](input_ids=ids, attention_mask=mask).logits

    def head(self, query: str | None) -> list[int]:
        """The tokens in front of every row: the classifier's own, and the question's if the compressor reads questions.

        Raises:
            ValueError: if a question is needed and there is none, or it takes more than half of a row.
        """
        before, after = self.pieces.before, self.pieces.after
        if not self.query_aware:
            return before
        check_queries(self.config.method, [query])
        asked = self.pieces(query or "").ids
        if len(asked) > (room := self.limit // 2 - len(before) - len(after)):
            raise ValueError(f"The question has {len(asked)} of the classifier's tokens, there is room for {room}.")
        return [*before, *asked, *after]

    def rows(self, text: str, query: str | None = None) -> tuple[Pieces, list[tuple[int, int]], list[int]]:
        """A text's tokens, the ranges of them that are read together, and the tokens in front of each range."""
        pieces, head = self.pieces(text), self.head(query)
        return pieces, cut(text, pieces, self.limit - len(head) - len(self.pieces.after)), head

    def row_ids(self, read: Sequence[tuple[Pieces, list[tuple[int, int]], list[int]]]) -> list[list[int]]:
        """The rows that the classifier reads, of all texts one after the other, special tokens and questions among them."""
        after = self.pieces.after
        return [[*head, *pieces.ids[a:b], *after] for pieces, ranges, head in read for a, b in ranges]

    def probabilities(
        self, texts: Sequence[str], queries: Sequence[str | None] | None = None
    ) -> list[tuple[Pieces, Tensor]]:
        """For each text its tokens and their probabilities ``[tokens]`` of being worth keeping."""
        read = [self.rows(text, query) for text, query in zip(texts, queries or [None] * len(texts), strict=True)]
        found = iter(row_probabilities(self.logits, self.row_ids(read), self.pieces.pad, self.device))
        out = []
        for pieces, ranges, head in read:
            parts = [next(found)[len(head) :][: b - a] for a, b in ranges]
            out.append((pieces, torch.cat(parts) if parts else torch.zeros(0)))
        return out

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """For every token (of the classifier) its word's probability of being worth keeping.

        Args:
            texts: the passages.
            queries: a question each; read with ``query_aware`` alone.
        """
        return [
            TokenScores(pieces.ids, pieces.offsets, spread_over_words(values, pieces.words, self.config.merge))
            for pieces, values in self.probabilities(texts, queries)
        ]

    # -- faithful --------------------------------------------------------------------------------------------------

    def published(self) -> PublishedWords:
        """The published computation with this compressor's classifier and settings."""
        config = self.config
        return PublishedWords(
            self.pieces,
            lambda rows: row_probabilities(self.logits, rows, self.pieces.pad, self.device),
            count=self._count,
            limit=self.limit,
            merge=config.merge,
            force=config.keep,
            digits=config.keep_digits,
            drop_consecutive=config.drop_consecutive,
            chunk_ends=config.chunk_ends,
        )

    def keep_contexts(self, texts: Sequence[str], ratio: float | None = None) -> list[bool]:
        """The published choice among contexts: those whose mean probability is at the percentile or above it.

        Args:
            texts: the contexts.
            ratio: of the whole prompt; ``(1 + 1 / ratio) / 2`` of the contexts stay. Default: the config's.
        """
        share = (kept_share(ratio or self.config.ratio) + 1) / 2
        with self._lock:
            return self.published().keep_contexts(self._check_texts(texts), share)

    def compress_contexts(
        self, texts: Sequence[str], ratio: float | None = None, *, target_tokens: int | None = None
    ) -> list[str | None]:
        """The published pipeline over a list of contexts: some stay, each compressed; the others are ``None``.

        Args:
            texts: the contexts.
            ratio: of the whole prompt; default: the config's.
            target_tokens: the reader's tokens of the whole prompt, in place of a ratio.

        Raises:
            ValueError: if both are given, or the target is no integer of at least 1.
        """
        if ratio is not None and target_tokens is not None:
            raise ValueError(f"Give ratio or target_tokens, not both (got {ratio} and {target_tokens}).")
        if target_tokens is not None and (not isinstance(target_tokens, int) or target_tokens < 1):
            raise ValueError(f"target_tokens must be an integer of at least 1, got {target_tokens!r}.")
        rate = kept_share(ratio or self.config.ratio)
        with self._lock:
            return self.published().compress_contexts(self._check_texts(texts), rate, target_tokens)

    def _compress(
        self,
        texts: list[str],
        queries: list[str | None],
        ratio: float | None,
        *,
        vectors: Any,
        target_tokens: int | None = None,
        **options: Any,
    ) -> list[CompressedPassage]:
        if self.config.mode == "fast":
            return super()._compress(texts, queries, ratio, vectors=vectors, target_tokens=target_tokens, **options)
        if options:
            raise TypeError(f"mode='faithful' has no options {sorted(options)}.")
        asked = self.config.ratio if ratio is None else ratio
        lengths = [self._count(text) for text in texts]
        rates = [kept_share(asked) if target_tokens is None else min(target_tokens / max(n, 1), 1.0) for n in lengths]
        info: dict[str, Any] = {"method": self.config.method, "mode": "faithful"}
        info |= {"ratio_asked": float(asked)} if target_tokens is None else {"target_tokens": target_tokens}
        published = self.published()
        out = []
        for text, n, rate in zip(texts, lengths, rates):
            kept = published.compress(text, rate)
            origin = self.fingerprint
            out.append(CompressedPassage("text", n, origin, text=kept, n_tokens=self._count(kept), info=dict(info)))
        return out
