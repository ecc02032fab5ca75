"""500xCompressor: the keys and values of a few memory tokens behind a passage, read by the reader as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..encoders.lora import ReaderTuningSettings, tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from .encode import drop_idle_lora
from .memory_slots import KVSlotCompressor, KVSlotConfig


@dataclass
class KVMemoryConfig(KVSlotConfig, ReaderTuningSettings):
    """Settings of 500xCompressor. ``KVMemoryConfig.faithful()`` gives the paper's form."""

    method: ClassVar[str] = "500x"
    most_field: ClassVar[str] = "num_mem"

    ratio: float | None = field(
        default=4.0,
        metadata={"help": "compression ratio where none is asked for; null: num_mem slots, however long the segment"},
    )
    num_mem: int = field(default=128, metadata={"help": "memory tokens, and the most slots that a segment gets"})
    init: Literal["tokens", "normal"] = field(
        default="tokens",
        metadata={
            "help": "memory embeddings start as those of random tokens, or as standard normal noise (the release)"
        },
    )
    reference_positions: bool = field(
        default=False,
        metadata={
            "help": "read the keys at the distances of the paper's release, whose decoder counts on from the number of slots "
            "and so stands before the keys that it reads"
        },
    )

    pad_to: int | None = field(
        default=None,
        metadata={
            "help": "pad every segment with EOS to this length, and attend to the padding, as the paper's release does"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_reader_tuning()
        if self.pad_to is not None and (not isinstance(self.pad_to, int) or self.pad_to < 1):
            raise ValueError(f"pad_to must be an integer of at least 1, got {self.pad_to!r}.")
        if self.segment_overlap and self.reference_positions:
            raise ValueError(
                "reference_positions reads a single segment as the paper's release does, which knows no segment_overlap; "
                "leave one out."
            )
        if self.init not in ("tokens", "normal"):
            raise ValueError(f"init must be 'tokens' or 'normal', got {self.init!r}.")

    @classmethod
    def faithful(cls, **changes: Any) -> KVMemoryConfig:
        """The paper's form: 16 memory tokens for every passage, LoRA of rank 64, keys read as the release reads them."""
        paper = {"num_mem": 16, "ratio": None, "fixed_slots": True, "r": 64, "init": "normal"}
        return cls(**{**paper, "reference_positions": True, **changes})


@register_compressor
class KVMemoryCompressor(KVSlotCompressor):
    """500xCompressor (arXiv 2408.03094).

    The reader plus LoRA reads ``[BOS][passage][memory tokens]``; the slots are its keys and values of every layer at the
    memory tokens, and the plain reader, without LoRA, reads them. LoRA stands only where a key or value depends on it: not
    on the last layer's queries, output and MLP.

    Beyond the paper: a passage of L tokens is cut into ``n = ceil(L / (num_mem * ratio))`` segments of ``ceil(L / n)``
    tokens, and a segment of S tokens gets ``ceil(S / ratio)`` slots, so that a short passage never grows
    (``fixed_slots=True`` is the paper's); padding is never attended to; and memory embeddings start as those of random
    tokens, on the scale of the reader's embeddings.

    The keys are rotated to the place where they stand in the prompt, behind what precedes them and before what follows. The
    paper's release leaves them as they were computed, at positions L, L+1, ..., L+M-1, while its decoder goes on at position M:
    the question then stands, by rotation, before the slots that it reads. ``reference_positions=True`` reads a single segment
    at just those distances (its passages declare the positions 0 ... M-1), for weights that were trained so.

    Args:
        config: the settings.
        reader: the reader; encoder and decoder share its parameters.

    Attributes:
        encoder: the reader's `LoRATwin`.
        memory: ``[num_mem, width]`` memory embeddings.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only); the paper's reader is frozen.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    config_class = KVMemoryConfig
    config: KVMemoryConfig

    def __init__(self, config: KVMemoryConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        drop_idle_lora(self.encoder)
        self.memory = nn.Parameter(self._start().to(reader.device))
        self.reader_twin = tuned_reader(self)

    @torch.no_grad()
    def _start(self) -> Tensor:
        reader, n = self.base_reader, self.config.num_mem
        if self.config.init == "normal":
            return torch.randn(n, reader.width)
        rows = torch.randperm(reader.vocab_size)[:n]
        start = reader.embed(rows[torch.arange(n) % len(rows)].to(reader.device)).float()
        return start * (reader.embedding_norm / start.norm(dim=-1, keepdim=True).clamp(min=1e-6))

    def memory_rows(self) -> Tensor:
        """``[num_mem, width]`` memory embeddings."""
        return self.memory

    def padded(self, piece: list[int]) -> list[int]:
        """A segment's ids, with EOS behind them up to ``pad_to``."""
        eos = self.base_reader.eos_id
        if self.config.pad_to is None:
            return piece
        if eos is None:
            raise ValueError(f"{self.base_reader.name!r} has no end-of-sequence token to pad with; set pad_to to None.")
        return piece + [eos] * (self.config.pad_to - len(piece))

    def declared_positions(self, computed: Tensor) -> Tensor:
        """The positions that the keys were computed at, or 0, 1, 2, ... for ``reference_positions``."""
        return torch.arange(len(computed)) if self.config.reference_positions else computed
