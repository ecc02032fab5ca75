"""Slots that are projected retrieval vectors: settings and base class of methods with a frozen embedder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts, setting
from ..encoders.embedder import MINILM, Embedder, checked_vectors, load_embedder, mean_runs
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from .projector import learned_scale, matching_factor, mlp, scaled


@dataclass
class VectorSettings(ReaderTuningSettings, CompressorConfig):
    """Config mixin of methods that project retrieval vectors."""

    embedder: str = setting(MINILM, "sentence-transformers id or folder of the frozen embedder")
    prompt: str = setting("", "text that the embedder wants before documents (such as 'passage: ')")
    shard_tokens: int = setting(180, "longest piece per slot, in embedder tokens; never above the embedder's limit")
    layers: int = setting(2, "linear layers of the projector, with GELU between them")
    hidden: int | None = setting(None, "width between the projector's layers; default: the reader's, as in the paper")
    vector_size: int | None = setting(None, "width of the vectors; filled in")
    embedder_hash: str | None = setting(None, "the embedder's fingerprint; filled in")

    def __post_init__(self) -> None:
        if not isinstance(self.embedder, str) or not self.embedder:
            raise ValueError(f"embedder must be the name or folder of an embedder, got {self.embedder!r}.")
        check_counts(self, {"shard_tokens": 1, "layers": 1, "hidden": 1, "vector_size": 1}, ("hidden", "vector_size"))
        self.check_reader_tuning()


class VectorCompressor(SoftCompressor):
    """Base class of methods whose slots are ``scale * MLP(embedder(passage))``.

    The embedder is frozen, and not part of this module's parameters; the projector and its scale train. A passage longer than
    ``shard_tokens`` becomes several equally long shards with one slot each, cut between words. Pass vectors that the index
    holds already as ``vectors``, so that nothing is embedded twice. Every vector is first brought to root mean square 1.

    Args:
        config: the settings.
        reader: the reader.
        embedder: an embedder or a SentenceTransformer, instead of loading ``config.embedder``. It must be the one of training.

    Attributes:
        vector_size: width of the retrieval vectors.
        projector: ``[n, vector_size] -> [n, width]``.
        log_scale: logarithm of the output factor.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
    """

    config: VectorSettings

    def __init__(self, config: VectorSettings, reader: Reader, *, embedder: Any = None) -> None:
        super().__init__(config, reader)
        self._embedder: Embedder | None = None if embedder is None else load_embedder(embedder, reader.device)
        if config.vector_size is None or config.embedder_hash is None:
            found = self.embedder
            self.config = replace(config, vector_size=found.dim, embedder_hash=found.fingerprint)
        if self._embedder is not None:
            self.check_embedder(self._embedder)
        self.vector_size = int(self.config.vector_size or 0)
        widths = [self.vector_size, *[config.hidden or reader.width] * (config.layers - 1), reader.width]
        self.projector = mlp(widths, nn.GELU)
        self.to(reader.device)
        with torch.no_grad():
            # the output scale is matched on random inputs
            noise = torch.randn(256, self.vector_size, generator=torch.Generator().manual_seed(0))
            found = self.projector(self.standardise(noise.to(reader.device)))
        self.log_scale: nn.Parameter | None = learned_scale(matching_factor(found, reader), reader)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """Nothing: the slots do not depend on the reader's weights."""
        return []

    @property
    def embedder(self) -> Embedder:
        """The frozen embedder, loaded at first use; a compressor that only gets vectors never loads it."""
        with self._lock:
            if self._embedder is None:
                self.check_embedder(found := self.load_embedder())
                self._embedder = found
            return self._embedder

    def load_embedder(self) -> Embedder:
        """Loads ``config.embedder``."""
        return load_embedder(self.config.embedder, self.reader.device)

    def encoder_body(self) -> Any:
        return self.embedder.model[0].auto_model

    def check_embedder(self, embedder: Embedder) -> None:
        """Raises ``ValueError`` if an embedder is not the one of training."""
        wanted = self.config.embedder_hash
        if wanted is not None and embedder.fingerprint != wanted:
            raise ValueError(
                f"The embedder {embedder.name!r} ({embedder.fingerprint}, {embedder.dim} wide) is not the one this "
                f"{self.config.title} compressor was made with "
                f"({self.config.embedder!r}, {wanted}, {self.config.vector_size} wide); pass that "
                "one as embedder=..., or train a compressor for this one."
            )

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """Projected vectors, embedded here unless given as ``[dim]`` or ``[shards, dim]``.

        Given vectors decide the number of slots; if there are more than the passage has reader tokens, neighbours are averaged.
        A passage without embedder tokens gets zero slots. Raises ``ValueError`` for vectors of another shape, NaN or infinity.
        """
        texts, lengths = passages.texts, [len(ids) for ids in passages.ids]
        found: list[Tensor] = [torch.zeros(0, self.vector_size)] * len(texts)
        todo = []
        for i, (text, n) in enumerate(zip(texts, lengths)):
            if passages.vectors is not None and passages.vectors[i] is not None:
                vectors = checked_vectors(passages.vectors[i], self.vector_size, f"passage {i}", self.config.embedder)
                found[i] = mean_runs(vectors, n if text.strip() else 0)
            elif text.strip():
                todo.append(i)
        if todo:
            least = [1 if ratio is None else min(math.ceil(lengths[i] / ratio), lengths[i]) for i in todo]
            most, prompt = self.config.shard_tokens, self.config.prompt
            for i, vectors in zip(todo, self.embedder.embed_shards([texts[i] for i in todo], most, least, prompt)):
                found[i] = mean_runs(vectors, lengths[i])
        return self.project(torch.cat(found)).split([len(vectors) for vectors in found])

    def project(self, vectors: Tensor) -> Tensor:
        """Slots ``[n, width]`` of vectors ``[n, vector_size]``."""
        like = next(self.projector.parameters())
        return scaled(self.projector(self.standardise(vectors.to(like))), self.log_scale)

    def standardise(self, vectors: Tensor) -> Tensor:
        """Brings vectors to root mean square 1."""
        return nn.functional.normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])
