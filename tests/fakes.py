"""Small compressors and stored entries for tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from nutgraf import CompressedPassage, Reader
from nutgraf.adapters.store import Entry, PassageKey
from nutgraf.compressors import CompressorConfig, SoftCompressor, TextCompressor

_count = itertools.count()


@dataclass
class FakeConfig(CompressorConfig):
    method: ClassVar[str] = "test-only"
    slots: int = 4
    seed: int = 0


class Identity(SoftCompressor):
    """Every passage becomes its own token embeddings, so that compressed and plain contexts read alike.

    Records its inputs, and fails on a text with "bad" in it.
    """

    config_class = FakeConfig
    interface = "embeds"

    def __init__(self, reader: Reader) -> None:
        super().__init__(FakeConfig(), reader)
        self.asked: list[str] = []
        self.calls: list[tuple[str, str | None, Any]] = []  # text, query, vector
        self.name = f"identity {next(_count)}"  # no test finds what another one compressed

    def identity_parts(self) -> list[Any]:
        return [self.name]

    def encode(self, texts, query=None, ratio=None, vectors=None):
        self.asked += texts
        self.calls += zip(texts, query, vectors or [None] * len(texts))
        if any("bad" in text for text in texts):
            raise RuntimeError("the model is out of order")
        return [self.reader.identity(text) for text in texts]


class Fixed(SoftCompressor):
    """Every passage becomes the embeddings of its first tokens; records its inputs, and can be stopped."""

    config_class = FakeConfig
    interface = "embeds"

    def __init__(self, reader: Reader, **settings: Any) -> None:
        super().__init__(FakeConfig(**settings), reader)
        self.asked: list[str] = []
        self.fail_after: int | None = None

    def encode(self, texts, query=None, ratio=None, vectors=None):
        if self.fail_after is not None and len(self.asked) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += texts
        out = []
        for text in texts:
            ids = self.reader.tokenize(text)
            embeds = self.reader.embed(torch.tensor(ids[: self.config.slots], dtype=torch.long))
            reader = self.reader.fingerprint
            out.append(CompressedPassage("embeds", len(ids), self.fingerprint, reader, embeds=embeds))
        return out


class FirstWords(TextCompressor):
    """Keeps the first two words."""

    config_class = FakeConfig

    def _compress(self, texts, queries, ratio, *, vectors, **options):
        kept = [" ".join(text.split()[:2]) for text in texts]
        return [CompressedPassage("text", len(t.split()), "first", text=k, n_tokens=2) for t, k in zip(texts, kept)]


def stored_entry(number: int, slots: int = 4, compressor: str = "compressor") -> Entry:
    """A store's entry that depends only on its number."""
    text = f"passage {number}"
    embeds = torch.randn(slots, 64, generator=torch.Generator().manual_seed(number))
    passage = CompressedPassage("embeds", 4 * slots, compressor, "reader", embeds=embeds)
    return Entry(PassageKey.of(text, compressor=compressor, reader="reader"), passage, text)
