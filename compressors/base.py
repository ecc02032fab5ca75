"""The one base of all compressors, its soft branch and its text branch."""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .core.checkpoint import load_weights, read_config, write_checkpoint
from .core.config import CompressorConfig, check_queries
from .core.errors import CheckpointError, ReaderMismatchError
from .core.fingerprint import hash_json, hash_tensors
from .core.passage import CompressedPassage, Interface

if TYPE_CHECKING:
    from .encoders.lora_twin import Twin
    from .reader.reader import Reader

Query = str | Sequence[str | None] | None
CompressorT = TypeVar("CompressorT", bound="Compressor")


class Compressor(nn.Module, ABC):
    """Passages in, compressed passages out, one for each, in order.

    Args:
        config: the method's settings.
        reader: the reader that is to read the compressed passages. It is held, not owned: its weights are no part of
            this module's parameters.
    """

    config_class: ClassVar[type[CompressorConfig]]
    interface: ClassVar[Interface]
    query_aware: bool = False  # passages are compressed for a question: adapters and benchmarks hand it over

    def __init__(self, config: CompressorConfig, reader: Reader) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"{type(self).__name__} wants a {self.config_class.__name__}, got {type(config).__name__}.")
        self.config = config
        self.query_aware = getattr(config, "query_aware", type(self).query_aware)
        self._held: tuple[Reader, ...] = (reader,)  # a tuple hides the reader from nn.Module's registration
        self._lock = threading.RLock()
        self._fingerprint: tuple[tuple[int, ...], str] | None = None

    @property
    def base_reader(self) -> Reader:
        """The reader as it was given."""
        return self._held[0]

    @property
    def reader(self) -> Reader:
        """The reader that reads what this compressor makes: the one given, or an `AdaptedReader` tuned on top of it."""
        return self._held[-1]

    def adapt_reader(self, twin: Twin) -> None:
        """Let the passages be read with a twin of the reader, whose weights are then this compressor's."""
        from .encoders.tuned_reader import AdaptedReader

        self._held = (self._held[0], AdaptedReader(self._held[0], twin))

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
        """Compresses passages. Safe to call from several threads.

        Args:
            texts: the passages; an empty one gives a compressed passage of zero slots.
            query: one question for all passages, or one (or ``None``) for each; methods that know no queries ignore it,
                and those made with ``query_aware=True`` need it.
            ratio: compression ratio L / l (at least 1) in place of the config's own.
            vectors: retrieval vectors that the index already holds, one entry a passage (methods that use them).
            batch_size: passages taken at a time; ``None`` lets the method choose.
            progress: show a progress bar.
            options: further options of the method.

        Raises:
            TypeError: if ``texts`` is one string or holds anything else than strings.
            ValueError: if ``ratio``, ``query`` or ``vectors`` do not fit.
        """
        texts = self._check_texts(texts)
        queries = self._check_query(query, len(texts))
        if ratio is not None and not (isinstance(ratio, int | float) and math.isfinite(ratio) and ratio >= 1):
            raise ValueError(f"ratio is source tokens per slot, a finite number of at least 1, got {ratio!r}.")
        if vectors is not None and len(vectors) != len(texts):
            raise ValueError(f"vectors must hold one entry a passage: got {len(vectors)} for {len(texts)} passages.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
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

    @abstractmethod
    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        """The method's own part of `compress`, on checked input, without gradients."""

    @staticmethod
    def _check_texts(texts: Sequence[str]) -> list[str]:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of passages, got one string; write compress([text]).")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"Every passage must be a string; passage {i} is a {type(text).__name__}.")
        return texts

    @staticmethod
    def _check_query(query: Query, n: int) -> list[str | None]:
        queries = [query] * n if query is None or isinstance(query, str) else list(query)
        if len(queries) != n:
            raise ValueError(f"query must be one question or one a passage: got {len(queries)} for {n} passages.")
        if bad := [q for q in queries if q is not None and not isinstance(q, str)]:
            raise TypeError(f"A query must be a string or None, got {type(bad[0]).__name__}.")
        return queries

    # -- identity --------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors that are trained, saved and hashed: by default every parameter of this module."""
        return dict(self.named_parameters())

    def identity_parts(self) -> list[Any]:
        """JSON-able facts beside config and weights that decide what comes out (an embedder's name, say)."""
        return []

    @property
    def fingerprint(self) -> str:
        """Hash of method, config, weights and `identity_parts`; changes when any of them does."""
        state = self.trainable_state()
        versions = tuple(n for t in state.values() for n in (t.data_ptr(), t._version))
        if self._fingerprint is None or self._fingerprint[0] != versions:
            parts = (self.config_class.method, self.config.to_dict(), self.identity_parts())
            self._fingerprint = (versions, hash_json(*parts, hash_tensors(state.items())))
        return self._fingerprint[1]

    @property
    def origin(self) -> str:
        """What a compressed passage says it was made by: the fingerprint; while training, a placeholder."""
        # In training the weights change with every step, and hashing them each time would be waste.
        return "training" if self.training and torch.is_grad_enabled() else self.fingerprint

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (the trained tensors alone), each atomically.

        Args:
            folder: where to.
            dtype: rounds the tensors to this floating dtype; ``None`` keeps theirs. A compressor that is loaded from rounded
                tensors has another fingerprint than the one that was saved.
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
        """Loads what `save_pretrained` wrote, for the same reader.

        Raises:
            CheckpointError: if files are missing or damaged, or weights are missing, left over or misshapen.
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
        """Copies a checkpoint's weights in. Raises ``CheckpointError`` with the names unless every key matches."""
        load_weights(folder, self.trainable_state(), type(self).__name__)


class SoftCompressor(Compressor):
    """A compressor whose result is read as embeddings or as keys and values, and which can be trained."""

    @abstractmethod
    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Like `compress`, but differentiable in the trained parameters; what training calls."""

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
    """A compressor whose result is a shorter text, which any reader can read."""

    interface: ClassVar[Interface] = "text"


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode and back."""
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
