"""KV matching: keep the keys and values that questions about a passage attend to, without training.

Each passage is read once, with questions made from it by rule. The pairs that the questions attend to are kept, by one
ranking over all heads of all layers. A bias per pair and refitted values then make attention over the kept pairs give
what it gave over all of them (Attention Matching, arXiv 2602.16284). Other scores, budgets and repairs are choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Compressor, Query
from ..core.batching import pack, pass_positions
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import CompressedPassage, Interface
from ..reader.attention import check_reachable
from ..reader.reader import Reader
from ..registry import register_compressor
from .encode import check_movable, kv_shapes
from .probing import Evidence, read, write_probes
from .repair import repair
from .selection import BUDGETS, SCORES, attention, select, wide


@dataclass
class KVMatchConfig(CompressorConfig):
    """Settings of KV matching; none of them needs training."""

    method: ClassVar[str] = "kv-match"
    title: ClassVar[str] = "KV matching"
    cost: ClassVar[str] = "states"

    ratio: float = field(default=4.0, metadata={"help": "compression ratio unless another one is asked for"})
    score: Literal["probes", "kvzip", "snapkv", "keydiff", "expected", "random", "first"] = field(
        default="probes", metadata={"help": "what ranks the pairs; 'snapkv' needs the question"}
    )
    budget: Literal["global", "per-layer", "uniform"] = field(
        default="global", metadata={"help": "divide the pairs over all heads, over the heads of each layer, or evenly"}
    )
    repair: Literal["bias+values", "bias", "none"] = field(
        default="bias+values", metadata={"help": "what is refitted on the kept pairs"}
    )
    probes: int = field(default=48, metadata={"help": "rule-made questions per passage"})

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_counts(self, {"probes": 1})
        check_choices(self, {"score": SCORES, "budget": BUDGETS, "repair": ("bias+values", "bias", "none")})

    @property
    def query_aware(self) -> bool:
        """Whether passages are compressed for a question."""
        return SCORES[self.score][1] == "query"


@register_compressor
class KVMatchCompressor(Compressor):
    """Passages as ragged keys and values of the reader itself.

    A passage is read right after the BOS, where the reader has one. Without a BOS its first token is the attention sink
    and is always kept.

    Args:
        config: the settings.
        reader: the reader; its keys must be movable, and its attention sdpa or eager.

    Attributes:
        batch_positions: positions of one forward pass (memory vs. speed; changes no result).

    Raises:
        ValueError: if the reader's keys cannot move or its attention cannot take a bias.
    """

    config_class = KVMatchConfig
    interface: ClassVar[Interface] = "kv"
    training_free = True
    config: KVMatchConfig

    def __init__(self, config: KVMatchConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        check_movable(reader)
        check_reachable(reader.model)
        if len(shapes := set(kv_shapes(reader))) > 1:
            raise ValueError(f"kv-match needs layers of one shape, and {reader.name!r} has {sorted(shapes)}.")
        self.shape = shapes.pop()
        self.batch_positions = 4096
        self._evidence: dict[str, Evidence] | None = None  # what `compress_at` has read

    def identity_parts(self) -> list[Any]:
        """The pairs are the reader's."""
        return [self.base_reader.fingerprint]

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
        step = min(batch_size or 8, 8)  # what is read is kept for so few passages only: it takes some 100 MB each
        out: list[list[CompressedPassage]] = [[] for _ in ratios]
        with self._lock:
            try:
                for start in range(0, len(texts), step):
                    part = slice(start, start + step)
                    self._evidence = {}
                    for found, ratio in zip(out, ratios):
                        found += self.compress(texts[part], queries[part], ratio, **options)
            finally:
                self._evidence = None
        return out

    def _read(self, ids: list[list[int]], probes: list[list[list[int]]]) -> Evidence:
        if self._evidence is None:
            return read(self.base_reader, ids, probes)
        key = str((ids, probes))
        if key not in self._evidence:
            self._evidence[key] = read(self.base_reader, ids, probes)
        return self._evidence[key]

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        if options:
            raise TypeError(f"kv-match has no options {sorted(options)}.")
        reader = self.base_reader
        ids = reader.tokenize_batch(texts)
        probes = [self._probes(text, query) if tokens else [] for text, tokens, query in zip(texts, ids, queries)]
        for passage, asked in zip(ids, probes):
            self._check_room(len(passage) + max(map(len, asked), default=0))
        sizes = [len(passage) + sum(map(len, asked)) + len(reader.bos_ids) for passage, asked in zip(ids, probes)]
        wanted = self.config.ratio if ratio is None else float(ratio)
        none = torch.zeros(0, device=reader.device, dtype=reader.dtype)
        heads, wide, deep = self.shape
        counts = torch.zeros(len(reader.kv_placement.kinds), heads, dtype=torch.int32)
        empty = (none.view(0, wide), none.view(0, deep), none, none.int(), counts)
        out = {i: self._package(empty, 0, wanted) for i, passage in enumerate(ids) if not passage}
        full = [i for i, passage in enumerate(ids) if passage]
        for batch in pack([sizes[i] for i in full], self.batch_positions, pass_positions(reader.device)):
            which = [full[i] for i in batch]
            evidence = self._read([ids[i] for i in which], [probes[i] for i in which])
            for i, pairs in zip(which, self._match(evidence, wanted)):
                out[i] = self._package(pairs, len(ids[i]), wanted)
        return [out[i] for i in range(len(texts))]

    def _probes(self, text: str, query: str | None) -> list[list[int]]:
        needs = SCORES[self.config.score][1]
        if needs == "query" and not query:
            raise ValueError(f"The score {self.config.score!r} needs the question: compress(texts, query=...).")
        if needs == "nothing":
            if self.config.repair == "none":
                return []
            needs = "questions"
        return write_probes(self.base_reader, text, needs, self.config.probes, query)

    def _check_room(self, tokens: int) -> None:
        reader = self.base_reader
        limits = [n for n in (reader.max_positions, reader.kv_placement.max_length) if n is not None]
        if limits and len(reader.bos_ids) + tokens > min(limits):
            raise ValueError(
                f"A passage and the longest probe take {tokens} tokens, and {reader.name!r} reads keys and values in "
                f"prompts of up to {min(limits)} positions; cut the passage into shorter ones."
            )

    def _match(self, evidence: Evidence, ratio: float) -> Iterator[tuple[Tensor, ...]]:
        """Of each passage the keys, values, bias and positions of the kept pairs, and ``[layers, kv_heads]`` counts."""
        config, placement = self.config, self.base_reader.kv_placement
        score, device = SCORES[config.score][0], evidence.tokens.device
        scores = [score(layer, evidence, placement, i) for i, layer in enumerate(evidence.layers)]
        stacked = torch.stack(scores, 1)  # [batch, layers, kv_heads, n]
        kept = select(stacked, evidence.tokens.sum(1), ratio, config.budget, sink=not evidence.start)
        fitted = []
        for i, layer in enumerate(evidence.layers):
            bias, values = torch.zeros_like(stacked[:, i]), wide(layer.values)
            if config.repair != "none":
                bias, values = repair(attention(layer, evidence), values, kept[:, i], config.repair)
            fitted.append((layer.keys, values.to(layer.values.dtype), bias.to(layer.values.dtype)))
        keys, values, bias = (torch.stack(part, 1) for part in zip(*fitted))
        at = (torch.arange(kept.shape[-1], device=device, dtype=torch.int32) + evidence.start).expand_as(kept)
        for row, chosen in enumerate(kept):
            found = [part[row][chosen] for part in (keys, values, bias, at)]
            yield *found, chosen.sum(-1).int().cpu()

    def _package(self, pairs: tuple[Tensor, ...], tokens: int, ratio: float) -> CompressedPassage:
        keys, values, bias, positions, counts = pairs
        reader = self.base_reader
        return CompressedPassage(
            "kv",
            tokens,
            self.fingerprint,
            self.reader.fingerprint,
            keys=(keys,),
            values=(values,),
            positions=positions,
            info={"method": self.config.method, "ratio_asked": ratio, **reader.identity_card.runs_as},
            counts=counts,
            bias=None if self.config.repair == "none" else bias,
            span=(len(reader.bos_ids), tokens),
        )
