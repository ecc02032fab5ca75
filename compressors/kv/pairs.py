"""Base class of methods that keep some of the reader's own keys and values, without training."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..base import Compressor, CompressorT, Query
from ..core.batching import check_batch_size, pack, pass_positions
from ..core.config import added, check_counts, check_ratio, ratio_for
from ..core.keep import KeepSettings
from ..core.passage import CompressedPassage, Interface
from ..reader.attention import check_reachable
from ..reader.reader import Reader
from .encode import check_movable, kv_shapes
from .probing import Evidence, read


@dataclass(kw_only=True)
class PairSettings(KeepSettings):
    """Config mixin of every method that keeps pairs. What must stay counts against the budget."""

    ratio: float = field(default=4.0, metadata={"help": "compression ratio unless another one is asked for"})
    reread: int = added(0, "first tokens of a passage that the reader reads again, after the passages before it")

    def check_pairs(self) -> None:
        """Raises ``ValueError`` for a ratio below 1, tokens below 0 or a wrong list of what must stay."""
        check_ratio(self.ratio)
        check_counts(self, {"reread": 0})
        self.check_keep()


class PairCompressor(Compressor):
    """Reads each passage followed by probes, and packages the pairs that a method keeps as a ragged KV passage.

    A method implements `probes` (what is read after a passage) and `keep` (the pairs, from what was recorded). Its config
    extends `PairSettings`. With ``reread`` the first tokens of a passage are stored as token ids, and the reader reads them
    again (EPIC, arXiv 2410.15332); the ratio counts the tokens after them. A passage of no more tokens keeps pairs alone.

    Attributes:
        needs_states: whether `keep` wants the residual stream, too.
        batch_positions: positions of one forward pass (memory vs. speed; changes no result).

    Raises:
        ValueError: if the reader's keys cannot move or its attention cannot take a bias.
    """

    interface: ClassVar[Interface] = "kv"
    training_free = True
    needs_states = False
    config: Any

    def __init__(self, config: Any, reader: Reader) -> None:
        super().__init__(config, reader)
        check_movable(reader)
        check_reachable(reader.model)
        if len(shapes := set(kv_shapes(reader))) > 1:
            raise ValueError(
                f"{self.config.method} needs layers of one shape, and {reader.name!r} has {sorted(shapes)}."
            )
        self.shape = shapes.pop()
        self.batch_positions = 4096
        self._evidence: dict[str, Evidence] | None = None  # what `compress_at` has read

    def identity_parts(self) -> list[Any]:
        """The pairs are the reader's."""
        return [self.base_reader.fingerprint]

    def encoder_body(self) -> Any:
        """The reader's layers."""
        return self.base_reader.model.get_decoder()

    @classmethod
    def from_pretrained(cls: type[CompressorT], folder: str | Path, reader: Reader, **settings: Any) -> CompressorT:
        """Loads a folder written by `save_pretrained`; ``settings`` replace those in it, such as ``ratio`` and ``keep``."""
        compressor = super().from_pretrained(folder, reader)  # type: ignore[misc]
        saved = compressor.config.to_dict()
        changed = {**saved, **settings}
        if changed.get("score") != saved.get("score"):
            raise ValueError(f"{folder} holds weights of the score {saved['score']!r}; it has no other score.")
        compressor.config = cls.config_class.from_dict(changed)
        return compressor

    def compress_at(
        self,
        texts: Sequence[str],
        ratios: Sequence[float | None],
        query: Query = None,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> list[list[CompressedPassage]]:
        """Compresses passages at several ratios, reading each of them once."""
        texts = self._check_texts(texts)
        queries = self._check_query(query, len(texts))
        check_batch_size(batch_size)
        step = min(batch_size or 8, 8)  # what is read is kept for so few passages only: it takes some 100 MB each
        out: list[list[CompressedPassage]] = [[] for _ in ratios]
        with self._lock:
            for start in range(0, len(texts), step):
                part = slice(start, start + step)
                with shared_reading([self]):
                    for found, ratio in zip(out, ratios):
                        found += self.compress(texts[part], queries[part], ratio, **options)
        return out

    def _read(self, ids: list[list[int]], probes: list[list[list[int]]], again: int) -> Evidence:
        found: dict[str, Evidence] = {} if self._evidence is None else self._evidence
        whole = str((ids, probes, self.needs_states))
        if whole not in found:
            found[whole] = read(self.base_reader, ids, probes, states=self.needs_states)
            found[whole].shared = self._evidence is not None
        if (key := f"{whole}, {again}") not in found:
            found[key] = found[whole].behind(again)
        return found[key]

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        if options:
            raise TypeError(f"{self.config.method} has no options {sorted(options)}.")
        reader = self.base_reader
        wanted = self.config.ratio if ratio is None else float(ratio)
        ids = reader.tokenize_batch(texts)
        reread = self.config.reread
        again = [reread if len(tokens) > reread else 0 for tokens in ids]
        protected = [self._protected(text, len(tokens) - k, wanted, k) for text, tokens, k in zip(texts, ids, again)]
        probes = [
            self.probes(text, query, self._room(len(tokens))) if tokens else []
            for text, tokens, query in zip(texts, ids, queries)
        ]
        for passage, asked in zip(ids, probes):
            self._check_room(len(passage), max(map(len, asked), default=0))
        sizes = [len(passage) + sum(map(len, asked)) + len(reader.bos_ids) for passage, asked in zip(ids, probes)]
        none = torch.zeros(0, device=reader.device, dtype=reader.dtype)
        heads, wide, deep = self.shape
        counts = torch.zeros(len(reader.kv_placement.kinds), heads, dtype=torch.int32)
        empty = (none.view(0, wide), none.view(0, deep), none, none.int(), counts)
        out = {i: self._package(empty, [], wanted, 0) for i, passage in enumerate(ids) if not passage}
        for k in sorted(set(again)):
            full = [i for i, passage in enumerate(ids) if passage and again[i] == k]
            for batch in pack([sizes[i] for i in full], self.batch_positions, pass_positions(reader.device)):
                which = [full[i] for i in batch]
                evidence = self._read([ids[i] for i in which], [probes[i] for i in which], k)
                evidence.protected = pad_sequence([protected[i] for i in which], batch_first=True).to(reader.device)
                for i, pairs in zip(which, self.keep(evidence, wanted)):
                    out[i] = self._package(pairs, ids[i], wanted, k)
        return [out[i] for i in range(len(texts))]

    @abstractmethod
    def probes(self, text: str, query: str | None, room: int | None) -> list[list[int]]:
        """Token ids of each text that is read after a passage, where ``room`` tokens fit (``None``: any number)."""

    @abstractmethod
    def keep(self, evidence: Evidence, ratio: float) -> Iterable[tuple[Tensor, ...]]:
        """Of each passage the keys, values, bias and positions of the kept pairs, and ``[layers, kv_heads]`` counts.

        All are concatenated over layers, then heads. A bias without entries means none.
        """

    def _protected(self, text: str, tokens: int, ratio: float, again: int) -> Tensor:
        """``[tokens]`` bool, those after the first ``again`` that must stay; ``ValueError`` if they exceed the budget."""
        stay = torch.zeros(again + tokens, dtype=torch.bool)
        if not (tokens and self.config.keeps):
            return stay[again:]
        spans = self.config.kept_spans(text)
        places = self.base_reader.tokenize_with_offsets(text)[1] if spans else []
        for i, (start, end) in enumerate(places):
            stay[i] = any(start < b and a < max(end, start + 1) for a, b in spans)
        stay = stay[again:]
        sink = not self.base_reader.bos_ids and not again and not bool(stay[0])  # always kept, too
        if (least := int(stay.sum()) + sink) > max(1, int(tokens / ratio + 1e-6)) and bool(stay.any()):
            raise ValueError(
                f"What must stay takes {least} of the {tokens} tokens of {text[:40]!r}..., and ratio {ratio:g} leaves room "
                f"for {max(1, int(tokens / ratio + 1e-6))} in every head; ask for ratio {ratio_for(tokens, least)} or less, or "
                "keep fewer words (keep, keep_patterns, keep_digits, keep_names)."
            )
        return stay

    def _room(self, tokens: int) -> int | None:
        """Tokens that fit after a passage of so many; ``None``: any number."""
        reader = self.base_reader
        limits = [n for n in (reader.max_positions, reader.kv_placement.max_length) if n is not None]
        return min(limits) - len(reader.bos_ids) - tokens if limits else None

    def _check_room(self, tokens: int, probe: int) -> None:
        room = self._room(tokens)
        if room is not None and probe > room:
            reader = self.base_reader
            raise ValueError(
                f"A passage of {tokens} tokens leaves {max(room, 0)} of the {tokens + room + len(reader.bos_ids)} positions in "
                f"which {reader.name!r} reads keys and values, and what is read after it takes {probe}; cut the passage into "
                "shorter ones."
            )

    def _package(self, pairs: tuple[Tensor, ...], ids: list[int], ratio: float, again: int) -> CompressedPassage:
        keys, values, bias, positions, counts = pairs
        reader = self.base_reader
        return CompressedPassage(
            "kv",
            len(ids),
            self.fingerprint,
            self.reader.fingerprint,
            keys=(keys,),
            values=(values,),
            positions=positions,
            info={"method": self.config.method, "ratio_asked": ratio, **reader.identity_card.runs_as},
            counts=counts,
            bias=bias if bias.numel() else None,
            span=(len(reader.bos_ids) + again, len(ids) - again),
            first=tuple(ids[:again]),
        )


@contextlib.contextmanager
def shared_reading(compressors: Iterable[PairCompressor]) -> Iterator[None]:
    """Lets methods with the same reader use what each of them reads, until the block ends: some 100 MB per passage."""
    compressors = list(compressors)
    evidence: dict[str, Evidence] = {}
    for compressor in compressors:
        compressor._evidence = evidence
    try:
        yield
    finally:
        for compressor in compressors:
            compressor._evidence = None
