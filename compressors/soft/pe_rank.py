"""PE-RANK: a projected retrieval vector stands for a passage, and the tuned reader ranks passages by these vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core.config import setting
from ..core.passage import Interface
from ..reader.ranking import rank_passages
from ..registry import register_compressor
from ..slots.vectors import VectorCompressor, VectorSettings


@dataclass
class PERankConfig(VectorSettings):
    """Settings of PE-RANK."""

    method: ClassVar[str] = "pe-rank"
    title: ClassVar[str] = "PE-RANK"
    cost: ClassVar[str] = "vector"

    tune_reader: bool = setting(
        True, "also tune the reader, which ranks, with a LoRA of its own: compressor.reader", kw_only=True
    )


@register_compressor
class PERankCompressor(VectorCompressor):
    """Passage embeddings for listwise reranking (PE-RANK, arXiv 2406.14848).

    A passage is one slot, ``scale * MLP(embedder(passage))`` with Linear-GELU-Linear (see `VectorCompressor`). The reader reads
    a query and the slots of all candidates, and its states choose one slot after the other (`rank_passages`). No text of the
    passages is read, so stored slots can be reranked.

    Training: first ``lm``, to restate the passage from its slot with the reader frozen; then the objective ``rank``, with the
    reader. The paper tunes the whole reader and also reads the passages as text in that stage; here LoRA is tuned, on slots
    alone. A passage longer than ``shard_tokens`` has several slots, and ranking uses their mean.
    """

    config_class: ClassVar[type[PERankConfig]] = PERankConfig
    interface: ClassVar[Interface] = "embeds"
    config: PERankConfig

    def rank(self, query: str, texts: Sequence[str], *, window: int = 20, stride: int = 10) -> list[int]:
        """Indices of passages, the most relevant first; empty ones come last. Arguments as for `rank_passages`."""
        passages = self.compress(texts)
        full = [i for i, passage in enumerate(passages) if passage.slots]
        order = rank_passages(self.reader, query, [passages[i] for i in full], window=window, stride=stride)
        return [*(full[i] for i in order), *(i for i, passage in enumerate(passages) if not passage.slots)]
