"""Base classes of all compressors: the contract, and everything that methods share."""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .core.batching import check_batch_size
from .core.checkpoint import load_weights, read_config, write_checkpoint
from .core.config import CompressorConfig, check_queries
from .core.errors import CheckpointError, ReaderMismatchError
from .core.fingerprint import hash_json, hash_tensors
from .core.hidden import hide
from .core.passage import CompressedPassage, Interface
from .core.textfiles import check_strings
from .reader.reader import Reader

Query = str | Sequence[str | None] | None
CompressorT = TypeVar("CompressorT", bound="Compressor")


class Compressor(nn.Module, ABC):
    """Compresses passages: one compressed passage each, in order.

    Args:
        config: the method's settings.
        reader: the reader of the compressed passages. Its weights are not parameters of this module.

    Attributes:
        base_reader: the reader as given.
        reader: the reader to read the result with: ``base_reader``, or an `AdaptedReader` tuned together with this compressor.
    """

    config_class: ClassVar[type[CompressorConfig]]
    interface: ClassVar[Interface]
    training_free: ClassVar[bool] = False  # made by its method's name, from the reader alone
    query_aware: bool = False  # adapters and benchmarks pass the question if true
    base_reader: Reader
    reader: Reader

    def __init__(self, config: CompressorConfig, reader: Reader) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} wants a {self.config_class.__name__}, got {type(config).__name__}.")
        self.config = config
        self.query_aware = getattr(config, "query_aware", type(self).query_aware)
        hide(self, "base_reader", reader)
        hide(self, "reader", reader)
        self._lock = threading.RLock()
        self._fingerprint: tuple[Any, str] | None = None  # what it was made of, and it

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def adapt_reader(self, reader: Reader) -> None:
        """Sets the tuned copy of the reader that reads from now on; its trained weights must be parameters of this module."""
        hide(self, "reader", reader)

    def encoder_body(self) -> Any:
        """Return the transformer layers that read passages (LoRA included, no head), or None without such layers."""
        return getattr(getattr(self, "encoder", None), "decoder", None)

    # -- compressing -----------------------------------------------------------------------------------------------

    def compress(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        *,
        vectors: Sequence[Any] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[CompressedPassage]:
        """Compresses passages. Thread-safe.

        Args:
            texts: the passages. An empty one gives zero slots.
            query: one question for all passages, or one (or ``None``) per passage. Ignored unless the method is query-aware,
                which needs it.
            ratio: compression ratio L / l (at least 1); default: the config's.
            vectors: retrieval vectors that the index holds already, one entry per passage, for methods that use them.
            batch_size: passages per batch; ``None`` lets the method choose.
            progress: show a progress bar.
            options: further options of the method.

        Raises:
            TypeError: if ``texts`` is a single string or holds anything but strings.
            ValueError: if ``ratio``, ``query`` or ``vectors`` do not fit.
        """
        texts = self._check_texts(texts)
        queries = self._check_query(query, len(texts))
        if ratio is not None and not (isinstance(ratio, int | float) and math.isfinite(ratio) and ratio >= 1):
            raise ValueError(f"ratio is source tokens per slot, a finite number of at least 1, got {ratio!r}.")
        if vectors is not None and len(vectors) != len(texts):
            raise ValueError(f"vectors must hold one entry per passage: got {len(vectors)} for {len(texts)} passages.")
        check_batch_size(batch_size)
        out: list[CompressedPassage] = []
        step = batch_size or max(len(texts), 1)
        with self._lock, torch.no_grad(), evaluating(self):
            for start in _progress(range(0, len(texts), step), progress, type(self).__name__):
                part = slice(start, start + step)
                out += self._compress(
                    texts[part],
                    queries[part],
                    ratio,
                    vectors=None if vectors is None else vectors[part],
                    **options,
                )
        return [passage.detach().check() for passage in out]

    def compress_at(
        self, texts: Sequence[str], ratios: Sequence[float | None], query: Query = None, **options: Any
    ) -> list[list[CompressedPassage]]:
        """Compresses passages at several ratios; one list per ratio. Arguments otherwise as for `compress`."""
        return [self.compress(texts, query, ratio, **options) for ratio in ratios]

    @abstractmethod
    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        """Implements `compress` for checked input, without gradients."""

    @staticmethod
    def _check_texts(texts: Sequence[str]) -> list[str]:
        return check_strings("texts", texts, "passages")

    @staticmethod
    def _check_query(query: Query, n: int) -> list[str | None]:
        queries = [query] * n if query is None or isinstance(query, str) else list(query)
        if len(queries) != n:
            raise ValueError(f"query must be one question or one per passage: got {len(queries)} for {n} passages.")
        if bad := [q for q in queries if q is not None and not isinstance(q, str)]:
            raise TypeError(f"A query must be a string or None, got {type(bad[0]).__name__}.")
        return queries

    @property
    def pools_budget(self) -> bool:
        """Whether the passages of a call share their budget; a result then depends on the other passages."""
        return False

    # -- identity --------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Tensors to train, save and hash; default: all parameters of this module."""
        return dict(self.named_parameters())

    def identity_parts(self) -> list[Any]:
        """JSON-able facts that also decide the result, beside config and weights (such as the hash of an embedder)."""
        return []

    @property
    def fingerprint(self) -> str:
        """Hash of method, config, weights and `identity_parts`."""
        state, settings = self.trainable_state(), self.config.identity()
        now = settings, tuple(n for t in state.values() for n in (t.data_ptr(), t._version))
        if self._fingerprint is None or self._fingerprint[0] != now:
            parts = (self.config_class.method, settings, self.identity_parts())
            self._fingerprint = (now, hash_json(*parts, hash_tensors(state.items())))
        return self._fingerprint[1]

    @property
    def origin(self) -> str:
        """The fingerprint, or a placeholder during training, to save hashing the weights at every step."""
        return "training" if self.training and torch.is_grad_enabled() else self.fingerprint

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (trained tensors only), each atomically.

        Args:
            folder: the folder to write.
            dtype: floating dtype to round the tensors to; ``None`` keeps theirs. A compressor loaded from rounded tensors
                has another fingerprint.
        """
        state = self.trainable_state()
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        about = {
            "method": self.config_class.method,
            "reader": None if self.interface == "text" else self.base_reader.fingerprint,
            "reader_name": self.base_reader.name,
            "config": self.config.to_dict(),
        }
        write_checkpoint(folder, about, state)

    @classmethod
    def from_pretrained(cls: type[CompressorT], folder: str | Path, reader: Reader, **kwargs: Any) -> CompressorT:
        """Loads a folder written by `save_pretrained`, for the same reader.

        Raises:
            CheckpointError: if files are missing or damaged, or the weights do not match by name and shape.
            ReaderMismatchError: if the compressor was made for another reader.
        """
        about = read_config(folder)
        if about["method"] != cls.config_class.method:
            raise CheckpointError(
                f"{folder} holds a compressor of method {about['method']!r}, not {cls.config_class.method!r}; "
                "use load_compressor, which picks the class."
            )
        if about.get("reader") and about["reader"] != reader.fingerprint:
            raise ReaderMismatchError(
                f"{folder} was made for the reader {about.get('reader_name')!r} ({about['reader']}), but this is "
                f"{reader.name!r} ({reader.fingerprint}); load that reader, or train a compressor for this one."
            )
        compressor = cls(cls.config_class.from_dict(about["config"]), reader, **kwargs)
        compressor.load_trainable(folder)
        return compressor.eval()

    def load_trainable(self, folder: str | Path) -> None:
        """Copies a checkpoint's weights into this module. Raises ``CheckpointError`` unless every key matches."""
        load_weights(folder, self.trainable_state(), type(self).__name__)


@dataclass
class Passages:
    """A batch of passages to compress.

    Attributes:
        texts: the passages; empty if only token ids are given.
        queries: the question per passage, or ``None``.
        ids: the reader's token ids of each passage, without special tokens.
        vectors: retrieval vectors per passage, or ``None``.
    """

    texts: list[str]
    queries: list[str | None]
    ids: list[list[int]]
    vectors: Sequence[Any] | None = None


class SoftCompressor(Compressor):
    """Base class of trainable methods, which compress to embeddings or to keys and values.

    A method implements `encode_passages`. One that reads passages in segments extends `SegmentCompressor` and implements
    `encode_segments`. Everything else (checks, tokenisation, packaging, fingerprints, saving) is here.
    """

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Like `compress`, but differentiable in the trained parameters. Training calls this.

        A query-aware method compresses a passage without a question as it stands.
        """
        texts = self._check_texts(texts)
        queries = self._check_query(query, len(texts))
        if vectors is not None and len(vectors) != len(texts):
            raise ValueError(f"vectors must hold one entry per passage: got {len(vectors)} for {len(texts)} passages.")
        passages = Passages(texts, queries, self.reader.tokenize_batch(texts), vectors)
        made = self.encode_passages(passages, self.ratio_or_default(ratio)) if texts else []
        return self.package(made, [len(ids) for ids in passages.ids], ratio)

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Any]:
        """Computes the slots of each passage, differentiable.

        Args:
            passages: at least one passage.
            ratio: the ratio asked for, or the config's; ``None`` if there is neither.

        Returns:
            ``[slots, width]`` embeddings per passage, on the scale of the reader's embeddings; KV methods return `KVSlots`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode_passages.")

    def ratio_or_default(self, ratio: float | None) -> float | None:
        """The ratio asked for, or the config's."""
        return getattr(self.config, "ratio", None) if ratio is None else float(ratio)

    def package(
        self, made: Sequence[Any], source_tokens: Sequence[int], ratio: float | None
    ) -> list[CompressedPassage]:
        """Wraps the slots of passages, with who made them, for which reader and how."""
        origin, made_for = self.origin, self.reader.fingerprint
        info = {"method": self.config.method, "ratio_asked": self.ratio_or_default(ratio)}
        info |= self.base_reader.identity_card.runs_as
        return [
            CompressedPassage(self.interface, n, origin, made_for, info=dict(info), **self.slot_fields(slots))
            for slots, n in zip(made, source_tokens, strict=True)
        ]

    def slot_fields(self, slots: Any) -> dict[str, Any]:
        """The fields of a `CompressedPassage` that hold the slots."""
        return {"embeds": slots.to(self.base_reader.device, self.base_reader.dtype)}

    def identity_parts(self) -> list[Any]:
        """The base reader, on whose weights the slots depend."""
        return [self.base_reader.fingerprint]

    @classmethod
    def own_objectives(cls) -> dict[str, Callable[..., tuple[Tensor, int]]]:
        """The method's own training objectives, on whole documents, by their names in recipes; default: none.

        Each is called as ``objective(compressor, texts, rng, ratio)``, with documents, a ``random.Random`` and a compression
        ratio or ``None``. It returns the sum of its losses over tokens, differentiable, and the number of tokens.
        """
        return {}

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        if self.query_aware:
            check_queries(self.config.method, queries)
        return self.encode(texts, queries, ratio, vectors)


class TextCompressor(Compressor):
    """Base class of methods that compress to a shorter text, which any reader can read."""

    interface: ClassVar[Interface] = "text"


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager that puts a module in eval mode and back."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def _progress(steps: range, show: bool, label: str) -> Iterator[int]:
    if not show:
        yield from steps
        return
    from rich.progress import track

    yield from track(steps, description=label)
