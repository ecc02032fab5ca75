"""Full text and a tuned reader: nothing is compressed, so what is won is won by the tuning alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..base import Query, SoftCompressor
from ..core.config import CompressorConfig
from ..core.passage import CompressedPassage, Interface
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from ..registry import register_compressor


@dataclass
class FullTextConfig(CompressorConfig, ReaderTuningSettings):
    """Settings of the full text. Here the reader is tuned unless ``tune_reader=False``."""

    method: ClassVar[str] = "full-text"

    tune_reader: bool = field(
        default=True, kw_only=True, metadata={"help": "tune the reader; false: it reads as it is"}
    )

    def __post_init__(self) -> None:
        self.check_reader_tuning()


@register_compressor
class FullTextCompressor(SoftCompressor):
    """Every passage as its own token embeddings, read by a reader tuned on the same prompts as a compressor's.

    It compresses nothing (ratio 1, whatever is asked). It is the line that a method which tunes its reader is to be measured
    against: trained by the same recipe on the same data for as many steps, its F1 is what full text is worth to a tuned
    reader.

    Args:
        config: the settings.
        reader: the reader as it is before tuning.

    Attributes:
        reader_twin: the `LoRATwin` that ``reader`` reads with, or ``None``.
    """

    config_class = FullTextConfig
    interface: ClassVar[Interface] = "embeds"
    config: FullTextConfig

    def __init__(self, config: FullTextConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """The slots are the base reader's embeddings."""
        return [self.base_reader.fingerprint]

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """The passages' token embeddings.

        Args:
            texts: the passages.
            query, ratio, vectors: ignored: nothing is left out.
        """
        reader, out = self.base_reader, []
        origin, made_for = self.origin, self.reader.fingerprint
        for ids in reader.tokenize_batch(self._check_texts(texts)):
            with torch.no_grad():
                embeds = reader.embed(torch.tensor(ids, dtype=torch.long, device=reader.device))
            info = {"method": "full-text", **reader.identity_card.runs_as}
            out.append(CompressedPassage("embeds", len(ids), origin, made_for, embeds=embeds, info=info))
        return out
