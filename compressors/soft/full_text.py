"""Full text with a tuned reader: compresses nothing, to measure what tuning alone is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, setting
from ..core.passage import Interface
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..reader.reader import Reader
from ..registry import register_compressor


@dataclass
class FullTextConfig(ReaderTuningSettings, CompressorConfig):
    """Settings of full text. The reader is tuned unless ``tune_reader=False``."""

    method: ClassVar[str] = "full-text"
    title: ClassVar[str] = "full text, tuned reader"
    cost: ClassVar[str] = "none"

    tune_reader: bool = setting(True, "tune the reader; false: leave it as it is", kw_only=True)

    def __post_init__(self) -> None:
        self.check_reader_tuning()


@register_compressor
class FullTextCompressor(SoftCompressor):
    """Every passage as its own token embeddings (ratio 1), for a reader tuned like that of another compressor.

    Compare a method that tunes its reader with this one, trained by the same recipe on the same data for as many steps.

    Attributes:
        reader_twin: the `LoRATwin` that ``reader`` reads with, or ``None``.
    """

    config_class = FullTextConfig
    interface: ClassVar[Interface] = "embeds"
    config: FullTextConfig

    def __init__(self, config: FullTextConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.reader_twin = tuned_reader(self)

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """The passages' token embeddings, whatever the ratio."""
        reader = self.base_reader
        with torch.no_grad():
            return [reader.embed(torch.tensor(ids, dtype=torch.long, device=reader.device)) for ids in passages.ids]
