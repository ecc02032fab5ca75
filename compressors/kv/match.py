"""KV matching: keep the keys and values that questions about a passage attend to, without training.

Each passage is read once, with questions made from it by rule. The pairs that the questions attend to are kept, by one
ranking over all heads of all layers. A bias per pair and refitted values then make attention over the kept pairs give
what it gave over all of them (Attention Matching, arXiv 2602.16284). Other scores, budgets and repairs are choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.config import CompressorConfig, check_choices, check_counts
from ..reader.reader import Reader
from ..registry import register_compressor
from .pairs import PairCompressor, PairSettings
from .probing import Evidence, write_probes
from .repair import repair
from .selection import BUDGETS, SCORES, attention, select, wide
from .surrogate import FITTED

# What each score reads after a passage.
NEEDS = dict.fromkeys(FITTED, "nothing") | {name: needs for name, (_, needs) in SCORES.items()}


@dataclass
class KVMatchConfig(PairSettings, CompressorConfig):
    """Settings of KV matching; none of them needs training."""

    method: ClassVar[str] = "kv-match"
    title: ClassVar[str] = "KV matching"
    cost: ClassVar[str] = "probes"

    score: str = field(
        default="probes",
        metadata={
            "help": f"what ranks the pairs: {', '.join(NEEDS)}; 'snapkv' needs the question, {' and '.join(FITTED)} have "
            "weights"
        },
    )
    budget: Literal["global", "per-layer", "uniform"] = field(
        default="global", metadata={"help": "divide the pairs over all heads, over the heads of each layer, or evenly"}
    )
    repair: Literal["bias+values", "bias", "none"] = field(
        default="bias+values", metadata={"help": "what is refitted on the kept pairs"}
    )
    probes: int = field(default=48, metadata={"help": "rule-made questions per passage"})

    def __post_init__(self) -> None:
        self.check_pairs()
        check_counts(self, {"probes": 1})
        check_choices(self, {"score": NEEDS, "budget": BUDGETS, "repair": ("bias+values", "bias", "none")})

    @property
    def query_aware(self) -> bool:
        """Whether passages are compressed for a question."""
        return NEEDS[self.score] == "query"


@register_compressor
class KVMatchCompressor(PairCompressor):
    """Passages as ragged keys and values of the reader itself.

    A passage is read right after the BOS, where the reader has one. Without a BOS its first token is the attention sink
    and is always kept.

    Args:
        config: the settings.
        reader: the reader; its keys must be movable, and its attention sdpa or eager.
    """

    config_class = KVMatchConfig
    config: KVMatchConfig

    def __init__(self, config: KVMatchConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.needs_states = config.score in ("surrogate", "kvzip+")
        self.fitted = FITTED[config.score](reader) if config.score in FITTED else None

    def probes(self, text: str, query: str | None, room: int | None) -> list[list[int]]:
        """The questions, the repetition or the user's question that the score needs."""
        needs = NEEDS[self.config.score]
        if self.fitted is not None:
            self.fitted.check_fitted()
        if needs == "query" and not query:
            raise ValueError(f"The score {self.config.score!r} needs the question: compress(texts, query=...).")
        if needs == "nothing":
            if self.config.repair == "none":
                return []
            needs = "questions"
        return write_probes(self.base_reader, text, needs, self.config.probes, query, room)

    def keep(self, evidence: Evidence, ratio: float) -> Iterator[tuple[Tensor, ...]]:
        """Scores the pairs, divides the budget and repairs what is kept."""
        config, placement = self.config, self.base_reader.kv_placement
        score, device = self.fitted or SCORES[config.score][0], evidence.tokens.device
        how = config.repair if ratio > 1 else "none"  # all pairs are kept as they are
        scores = [score(layer, evidence, placement, i) for i, layer in enumerate(evidence.layers)]
        stacked = torch.stack(scores, 1)  # [batch, layers, kv_heads, n]
        if not bool(stacked.isfinite().all()):
            raise ValueError(
                f"Scores of {self.base_reader.name!r} are NaN or infinite; load the reader in float32 or bfloat16, and check "
                "its weights."
            )
        kept = select(
            stacked, evidence.tokens.sum(1), ratio, config.budget, sink=not evidence.start, protected=evidence.protected
        )
        fitted = []
        for i, layer in enumerate(evidence.layers):
            bias, values = torch.zeros_like(stacked[:, i]), wide(layer.values)
            if how != "none":
                bias, values = repair(attention(layer, evidence), values, kept[:, i], how)
            fitted.append((layer.keys, values.to(layer.values.dtype), bias.to(layer.values.dtype)))
        keys, values, bias = (torch.stack(part, 1) for part in zip(*fitted))
        at = (torch.arange(kept.shape[-1], device=device, dtype=torch.int32) + evidence.start).expand_as(kept)
        for row, chosen in enumerate(kept):
            found = [part[row][chosen] for part in (keys, values, bias, at)]
            if how == "none":
                found[2] = found[2][:0]
            yield *found, chosen.sum(-1).int().cpu()
