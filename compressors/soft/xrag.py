"""xRAG: the passage's retrieval vector, projected into the reader's embedding space, is read in the passage's place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.config import CompressorConfig, check_choices, check_counts
from ..core.passage import CompressedPassage, Interface
from ..encoders.embedder import MINILM, Embedder, load_embedder, load_last_token_embedder
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from ..registry import register_compressor

UNKNOWN = "unknown"
_PROBES = 256  # random inputs on which the output scale is matched


@dataclass
class XRAGConfig(CompressorConfig, ReaderTuningSettings):
    """Settings of xRAG. The defaults suit small embedders; ``XRAGConfig.faithful()`` gives the paper's projector."""

    method: ClassVar[str] = "xrag"

    embedder: str = field(
        default=MINILM, metadata={"help": "sentence-transformers id or folder of the frozen embedder"}
    )
    prompt: str = field(
        default="", metadata={"help": "what the embedder wants in front of documents ('passage: ', say)"}
    )
    shard_tokens: int = field(
        default=180,
        metadata={
            "help": "longest piece, in embedder tokens, that one slot stands for; never above the embedder's limit"
        },
    )
    layers: int = field(default=2, metadata={"help": "linear layers of the projector, with GELU between them"})
    hidden: int | None = field(
        default=None, metadata={"help": "width between the projector's layers; default: the reader's, as in the paper"}
    )
    normalize: bool = field(
        default=True,
        metadata={
            "help": "bring every vector to root-mean-square 1 first, so that index vectors of any length will do"
        },
    )
    scale: Literal["matched", "none"] = field(
        default="matched",
        metadata={
            "help": "'matched': a learned factor that starts at the reader's embedding norm; 'none': the bare projector"
        },
    )
    vector_size: int | None = field(
        default=None, metadata={"help": "width of the vectors; filled in from the embedder"}
    )
    embedder_hash: str | None = field(
        default=None,
        metadata={
            "help": "the embedder's fingerprint; filled in ('unknown': imported without having seen the embedder)"
        },
    )
    pooling: Literal["own", "last"] = field(
        default="own",
        metadata={
            "help": "'own': the vectors that sentence-transformers makes with this embedder; 'last': the bare last hidden "
            "state at its last token, as the authors' code takes it"
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.embedder, str) or not self.embedder:
            raise ValueError(f"embedder must be the name or folder of an embedder, got {self.embedder!r}.")
        check_counts(self, {"shard_tokens": 1, "layers": 1, "hidden": 1}, optional=("hidden",))
        check_choices(self, {"scale": ("matched", "none")})
        self.check_reader_tuning()
        if self.vector_size is not None and self.vector_size < 1:
            raise ValueError(f"vector_size must be at least 1, got {self.vector_size}.")

    @classmethod
    def faithful(cls, **changes: Any) -> XRAGConfig:
        """The paper's projector: raw vectors in, no output scale."""
        return cls(**{"normalize": False, "scale": "none", **changes})


@register_compressor
class XRAGCompressor(SoftCompressor):
    """One slot a passage: ``slot = scale * MLP(embedder(passage))`` (xRAG, arXiv 2405.13792).

    The embedder is frozen and is no part of this module's parameters; the projector (and its scale) trains. A passage
    longer than ``shard_tokens`` becomes several equally long shards with one slot each, cut between words. Where the index
    already holds the passages' vectors they are passed as ``vectors`` and nothing is embedded twice.

    Beyond the paper: shards are equally long and none is dropped (the paper's release drops a last shard of up to 20
    tokens), the output starts on the scale of the reader's embeddings, and ``ratio`` makes shards shorter.

    Args:
        config: the settings.
        reader: the reader.
        embedder: an embedder, or a SentenceTransformer, in place of loading ``config.embedder``. It must be the one that
            the compressor was trained with.

    Attributes:
        vector_size: width of the retrieval vectors.
        projector: ``[n, vector_size] -> [n, width]``.
        log_scale: logarithm of the output factor (``scale="matched"`` only).
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only); the paper's reader is frozen.
    """

    config_class = XRAGConfig
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
        self.log_scale = nn.Parameter(torch.zeros(())) if config.scale == "matched" else None
        self.to(reader.device)
        if self.log_scale is not None:
            self._match_scale()
        self.reader_twin = tuned_reader(self)

    @property
    def embedder(self) -> Embedder:
        """The frozen embedder, loaded at first use: a compressor that is only given vectors never loads it.

        Raises:
            ValueError: if it is not the one that the compressor was trained with.
        """
        with self._lock:
            if self._embedder is None:
                load = load_embedder if self.config.pooling == "own" else load_last_token_embedder
                found = load(self.config.embedder, self.reader.device)
                self._check_embedder(found)
                self._embedder = found
            return self._embedder

    def _check_embedder(self, embedder: Embedder) -> None:
        wanted = self.config.embedder_hash
        if wanted == UNKNOWN and embedder.dim == self.config.vector_size:
            return
        if wanted is not None and embedder.fingerprint != wanted:
            raise ValueError(
                f"The embedder {embedder.name!r} ({embedder.fingerprint}, {embedder.dim} wide) is not the one this xRAG "
                f"compressor was made with ({self.config.embedder!r}, {wanted}, {self.config.vector_size} wide); pass that "
                "one as embedder=..., or train a compressor for this one."
            )

    @torch.no_grad()
    def _match_scale(self) -> None:
        """Sets the scale so that random vectors come out with the mean norm of the reader's embeddings."""
        noise = torch.randn(_PROBES, self.vector_size, generator=torch.Generator().manual_seed(0))
        if not self.config.normalize and self._embedder is not None:
            probe = self._embedder.embed(["The nut graf tells the reader why the story matters."])
            noise = noise * probe.norm() / noise.norm(dim=-1, keepdim=True)
        out = self.projector(self._standardise(noise.to(self.reader.device)))
        self.log_scale.fill_(math.log(self.reader.embedding_norm / float(out.norm(dim=-1).mean())))  # type: ignore[union-attr]

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in the projector.

        Args:
            texts: the passages. One without any token of the embedder (empty or blank) gets zero slots.
            query: ignored: one vector serves all questions.
            ratio: at most this many reader tokens a slot, by shorter shards; ``None``: as few slots as there can be.
            vectors: for each text the retrieval vector ``[dim]``, vectors of its shards ``[shards, dim]``, or ``None`` to
                embed it here. Given vectors decide the number of slots, whatever ``ratio`` says; where there are more than
                the passage has reader tokens, neighbours are averaged.

        Raises:
            ValueError: if a vector's shape is neither of these, or it holds NaN or infinity.
        """
        texts = self._check_texts(texts)
        if vectors is not None and len(vectors) != len(texts):
            raise ValueError(f"vectors must hold one entry a passage: got {len(vectors)} for {len(texts)} passages.")
        lengths = [len(ids) for ids in self.reader.tokenize_batch(texts)]
        given = [None] * len(texts) if vectors is None else list(vectors)
        found: list[Tensor | None] = [None if v is None else self._check_vectors(v, i) for i, v in enumerate(given)]
        todo = [i for i, v in enumerate(found) if v is None and texts[i].strip()]
        for i, embedded in zip(todo, self._embed([texts[i] for i in todo], [lengths[i] for i in todo], ratio)):
            found[i] = embedded
        empty = torch.zeros(0, self.vector_size)
        rows = [empty if v is None or not texts[i].strip() else _at_most(v, lengths[i]) for i, v in enumerate(found)]
        slots = self.project(torch.cat(rows)) if rows else empty
        origin = self.origin
        info = {"method": "xrag", **self.reader.identity_card.runs_as}
        return [
            CompressedPassage("embeds", n, origin, self.reader.fingerprint, embeds=e, info=info)
            for n, e in zip(lengths, slots.split([len(r) for r in rows]))
        ]

    def project(self, vectors: Tensor) -> Tensor:
        """Slots ``[n, width]`` of vectors ``[n, vector_size]``, in the reader's dtype."""
        weight = next(self.projector.parameters())
        out = self.projector(self._standardise(vectors.to(weight.device, weight.dtype)))
        if self.log_scale is not None:
            out = out * self.log_scale.exp()
        return out.to(self.reader.device, self.reader.dtype)

    def _standardise(self, vectors: Tensor) -> Tensor:
        if not self.config.normalize:
            return vectors
        return nn.functional.normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])

    def _embed(self, texts: list[str], lengths: list[int], ratio: float | None) -> list[Tensor]:
        """For each text the vectors ``[shards, dim]``."""
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
            raise ValueError(f"The vectors of passage {index} are no numbers: {error}") from error
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
    """The vectors, or the means of ``n`` runs of neighbours where there are more: a passage never grows."""
    if len(vectors) <= n:
        return vectors
    return torch.stack([part.mean(dim=0) for part in vectors.tensor_split(n)]) if n else vectors[:0]
