"""500xCompressor: keys and values of memory tokens after a passage, read by the plain reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.config import check_counts, setting
from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import random_token_rows
from .encode import drop_idle_lora
from .memory_slots import KVSlotCompressor, KVSlotConfig


@dataclass
class KVMemoryConfig(ReaderTuningSettings, KVSlotConfig):
    """Settings of 500xCompressor."""

    method: ClassVar[str] = "500x"
    title: ClassVar[str] = "500xCompressor"
    retired: ClassVar[Mapping[str, Any]] = dict(
        **KVSlotConfig.retired, init="tokens", reference_positions=False, pad_to=None
    )

    ratio: float | None = setting(
        4.0, "compression ratio if none is asked for; null: num_mem slots, however long the segment", kw_only=True
    )
    num_mem: int = setting(128, "memory tokens: the most slots of a segment")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"num_mem": 1})
        self.check_reader_tuning()


@register_compressor
class KVMemoryCompressor(KVSlotCompressor):
    """500xCompressor (arXiv 2408.03094).

    The reader plus LoRA reads ``[BOS][segment][memory tokens]``. The slots are its keys and values of every layer at the
    memory tokens. The plain reader, without LoRA, reads them. LoRA matrices that no key or value depends on (the last layer's
    queries, output and MLP) are left out.

    Beyond the paper: slots are proportional to the segment, so that a short passage never grows. Padding is never attended
    to. Memory embeddings start as those of random tokens. Keys are rotated to their place in the prompt.

    Attributes:
        encoder: the reader's `LoRATwin`.
        memory: ``[num_mem, width]`` memory embeddings.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    config_class: ClassVar[type[KVMemoryConfig]] = KVMemoryConfig
    config: KVMemoryConfig

    def __init__(self, config: KVMemoryConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        drop_idle_lora(self.encoder)
        self.memory = nn.Parameter(random_token_rows(reader, config.num_mem))
        self.reader_twin = tuned_reader(self)

    @property
    def most_slots(self) -> int:
        """Memory tokens."""
        return self.config.num_mem

    def memory_embeddings(self) -> Tensor:
        """``[num_mem, width]``."""
        return self.memory
