"""xRAG: projects a passage's retrieval vector into the reader's embedding space, as one slot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts
from ..core.passage import Interface
from ..encoders.embedder import MINILM, Embedder, load_embedder
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.projector import learned_scale, matching_factor, scaled

UNKNOWN = "unknown"
_PROBES = 256  # random inputs on which the output scale is matched


@dataclass
class XRAGConfig(ReaderTuningSettings, CompressorConfig):
    """Settings of xRAG."""

    method: ClassVar[str] = "xrag"
    retired: ClassVar[Mapping[str, Any]] = {"normalize": True, "scale": "matched", "pooling": "own"}

    embedder: str = field(
        default=MINILM, metadata={"help": "sentence-transformers id or folder of the frozen embedder"}
    )
    prompt: str = field(
        default="", metadata={"help": "text that the embedder wants before documents (such as 'passage: ')"}
    )
    shard_tokens: int = field(
        default=180,
        metadata={"help": "longest piece per slot, in embedder tokens; never above the embedder's limit"},
    )
    layers: int = field(default=2, metadata={"help": "linear layers of the projector, with GELU between them"})
    hidden: int | None = field(
        default=None, metadata={"help": "width between the projector's layers; default: the reader's, as in the paper"}
    )
    vector_size: int | None = field(default=None, metadata={"help": "width of the vectors; filled in"})
    embedder_hash: str | None = field(default=None, metadata={"help": "the embedder's fingerprint; filled in"})

    def __post_init__(self) -> None:
        if not isinstance(self.embedder, str) or not self.embedder:
            raise ValueError(f"embedder must be the name or folder of an embedder, got {self.embedder!r}.")
        check_counts(self, {"shard_tokens": 1, "layers": 1, "hidden": 1, "vector_size": 1}, ("hidden", "vector_size"))
        self.check_reader_tuning()


@register_compressor
class XRAGCompressor(SoftCompressor):
    """One slot per passage: ``slot = scale * MLP(embedder(passage))`` (xRAG, arXiv 2405.13792).

    The embedder is frozen, and not part of this module's parameters; the projector and its scale train. A passage longer than
    ``shard_tokens`` becomes several equally long shards with one slot each, cut between words. Pass vectors that the index
    holds already as ``vectors``, so that nothing is embedded twice. Every vector is first brought to root mean square 1.

    Beyond the paper: no shard is dropped (the release drops a last shard of up to 20 tokens), the output starts on the scale of
    the reader's embeddings, and ``ratio`` makes shards shorter.

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

    config_class: ClassVar[type[XRAGConfig]] = XRAGConfig
    interface: ClassVar[Interface] = "embeds"
    config: XRAGConfig

    def __init__(self, config: XRAGConfig, reader: Reader, *, embedder: Any = None) -> None:
        super().__init__(config, reader)
        self._embedder: Embedder | None = None if embedder is None else load_embedder(embedder, reader.device)
        if config.vector_size is None or config.embedder_hash is None:
            found = self.embedder
            self.config = replace(config, vector_size=found.dim, embedder_hash=found.fingerprint)
        if self._embedder is not None:
            self._check_embedder(self._embedder)
        self.vector_size = int(self.config.vector_size or 0)
        widths = [self.vector_size, *[config.hidden or reader.width] * (config.layers - 1), reader.width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            layers += [*([nn.GELU()] if i else []), nn.Linear(a, b)]
        self.projector = nn.Sequential(*layers)
        self.to(reader.device)
        self.log_scale: nn.Parameter | None = None
        with torch.no_grad():
            noise = torch.randn(_PROBES, self.vector_size, generator=torch.Generator().manual_seed(0))
            found = self.projector(self.standardise(noise.to(reader.device)))
        self.log_scale = learned_scale(matching_factor(found, reader), reader)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """Nothing: the slots do not depend on the reader's weights."""
        return []

    @property
    def embedder(self) -> Embedder:
        """The frozen embedder, loaded at first use; a compressor that only gets vectors never loads it.

        Raises:
            ValueError: if it is not the one that the compressor was trained with.
        """
        with self._lock:
            if self._embedder is None:
                found = self.load_embedder()
                self._check_embedder(found)
                self._embedder = found
            return self._embedder

    def load_embedder(self) -> Embedder:
        """Loads ``config.embedder``."""
        return load_embedder(self.config.embedder, self.reader.device)

    def _check_embedder(self, embedder: Embedder) -> None:
        wanted = self.config.embedder_hash
        if wanted == UNKNOWN and embedder.dim == self.config.vector_size:
            return  # imported without its embedder
        if wanted is not None and embedder.fingerprint != wanted:
            raise ValueError(
                f"The embedder {embedder.name!r} ({embedder.fingerprint}, {embedder.dim} wide) is not the one this xRAG "
                f"compressor was made with ({self.config.embedder!r}, {wanted}, {self.config.vector_size} wide); pass that "
                "one as embedder=..., or train a compressor for this one."
            )

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """Projected vectors, embedded here unless given.

        ``passages.vectors`` holds per passage its vector ``[dim]``, vectors of its shards ``[shards, dim]``, or ``None``. Given
        vectors decide the number of slots; if there are more than the passage has reader tokens, neighbours are averaged.
        ``ratio`` is at most this many reader tokens per slot. A passage without embedder tokens gets zero slots.

        Raises:
            ValueError: if a vector has another shape, or holds NaN or infinity.
        """
        texts, lengths = passages.texts, [len(ids) for ids in passages.ids]
        given = [None] * len(texts) if passages.vectors is None else list(passages.vectors)
        found: list[Tensor | None] = [None if v is None else self._check_vectors(v, i) for i, v in enumerate(given)]
        todo = [i for i, v in enumerate(found) if v is None and texts[i].strip()]
        for i, embedded in zip(todo, self._embed([texts[i] for i in todo], [lengths[i] for i in todo], ratio)):
            found[i] = embedded
        empty = torch.zeros(0, self.vector_size)
        rows = [empty if v is None or not texts[i].strip() else _at_most(v, lengths[i]) for i, v in enumerate(found)]
        return self.project(torch.cat(rows)).split([len(r) for r in rows])

    def project(self, vectors: Tensor) -> Tensor:
        """Slots ``[n, width]`` of vectors ``[n, vector_size]``."""
        weight = next(self.projector.parameters())
        return scaled(self.projector(self.standardise(vectors.to(weight.device, weight.dtype))), self.log_scale)

    def standardise(self, vectors: Tensor) -> Tensor:
        """Brings vectors to root mean square 1."""
        return nn.functional.normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])

    def _embed(self, texts: list[str], lengths: list[int], ratio: float | None) -> list[Tensor]:
        """Vectors ``[shards, dim]`` per text."""
        if not texts:
            return []
        prompt = self.config.prompt
        limit = self.embedder.max_tokens - (self.embedder.count(prompt) if prompt else 0)
        if limit < 1:
            raise ValueError(
                f"The embedder's prompt {prompt!r} leaves no room in its {self.embedder.max_tokens} tokens."
            )
        longest = min(self.config.shard_tokens, limit)
        shards: list[list[str]] = []
        for text, n in zip(texts, lengths):
            wanted = 1 if ratio is None else min(math.ceil(n / ratio), n)
            spans = self.embedder.shard(text, longest, at_least=wanted)
            shards.append([prompt + text[a:b] for a, b in spans])
        flat = self.embedder.embed([shard for parts in shards for shard in parts])
        return list(flat.split([len(parts) for parts in shards]))

    def _check_vectors(self, vectors: Any, index: int) -> Tensor:
        try:
            tensor = torch.as_tensor(vectors).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The vectors of passage {index} are not numbers: {error}") from error
        size = self.vector_size
        if tensor.dim() not in (1, 2) or tensor.shape[-1] != size:
            raise ValueError(
                f"The vectors of passage {index} must be [{size}] or [shards, {size}], as {self.config.embedder!r} makes "
                f"them, got {list(tensor.shape)}; index with that embedder, or leave vectors out to embed here."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"The vectors of passage {index} hold NaN or infinite numbers; embed the passage again.")
        return tensor.reshape(-1, size)


def _at_most(vectors: Tensor, n: int) -> Tensor:
    """The vectors, or the means of ``n`` runs of neighbours if there are more, so that a passage never grows."""
    if len(vectors) <= n:
        return vectors
    return torch.stack([part.mean(dim=0) for part in vectors.tensor_split(n)]) if n else vectors[:0]
