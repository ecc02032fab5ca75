"""500xCompressor checkpoints: memory embeddings and LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..core.config import check_choices, check_counts, setting
from ..kv.encode import KVSlots
from ..kv.five_hundred import KVMemoryCompressor, KVMemoryConfig
from ..reader.reader import Reader
from ..slots.segments import Segment
from .layout import Source, holds_key, load_tensors, single_file
from .models import body_prefix, drop_idle, fill_lora, lora_shape, take_lora
from .published import PublishedCompressor, PublishedSettings

_MEMORY = "memory_embeddings"


@dataclass
class PublishedKVMemoryConfig(PublishedSettings, KVMemoryConfig):
    """Settings of 500xCompressor as its authors' code runs it."""

    init: Literal["tokens", "normal"] = setting(
        "tokens", "memory embeddings start as those of random tokens, or as standard normal noise", kw_only=True
    )
    reference_positions: bool = setting(
        False,
        "declare the keys' positions as 0, 1, 2, ..., so that text follows at the release's distances",
        kw_only=True,
    )
    pad_to: int | None = setting(
        None, "pad every segment with EOS to this length and attend to the padding", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"init": ("tokens", "normal")})
        check_counts(self, {"pad_to": 1}, optional=("pad_to",))


class PublishedKVMemory(PublishedCompressor, KVMemoryCompressor):
    """500xCompressor as its authors' code runs it.

    The release leaves keys as computed, at positions L ... L+M-1, while its decoder goes on at position M: the question stands,
    by rotation, before the slots. ``reference_positions=True`` reads a single segment at those distances.
    """

    config_class: ClassVar[type[KVMemoryConfig]] = PublishedKVMemoryConfig
    config: PublishedKVMemoryConfig

    def __init__(self, config: PublishedKVMemoryConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        if config.pad_to is not None and reader.eos_id is None:
            raise ValueError(f"{reader.name!r} has no end-of-sequence token to pad with; set pad_to to None.")

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the memory tokens, after padded segments."""
        if self.config.pad_to is not None:
            eos, most = [self.base_reader.eos_id or 0], self.config.pad_to
            segments = [replace(s, ids=s.ids + eos * (most - len(s.ids))) for s in segments]
        return super().encode_segments(segments)

    def slot_fields(self, slots: KVSlots) -> dict[str, Any]:
        """Keys, values and declared positions."""
        found = super().slot_fields(slots)
        if self.config.reference_positions:
            found["positions"] = torch.arange(len(slots.positions))
        return found


def recognises(path: Path) -> bool:
    """Whether it has 500xCompressor's layout."""
    return holds_key(path, _MEMORY)


def load(
    source: Source, *, lora_alpha: float = 32.0, pad_to: int | None = None, bos: bool = False
) -> PublishedKVMemory:
    """Imports 500xCompressor.

    Args:
        source: a file, or a folder with one file, of ``memory_embeddings`` and ``llama.*``; it needs the reader.
        lora_alpha: the release has 32.
        pad_to: pad each passage with EOS to this length and attend to the padding, as the release does (to 500). It changes the
            slots. Longer passages become several segments.
        bos: passages start with BOS; the authors' code leaves it out.
    """
    path = source.path
    reader = source.need_reader("holds a 500xCompressor without its reader")
    keys = source.keys(load_tensors(single_file(path)))
    memory = keys.take(_MEMORY, (1, None, reader.width))[0]
    lora = take_lora(keys, r"llama\.(?:base_model\.model\.)?" + re.escape(body_prefix(reader.model)))
    keys.done()
    rank, targets = lora_shape(lora, path)
    config = PublishedKVMemoryConfig(
        ratio=None,
        fixed_slots=True,
        init="normal",
        reference_positions=True,
        num_mem=len(memory),
        r=rank,
        alpha=float(lora_alpha),
        target_modules=tuple(targets),
        pad_to=pad_to,
        segment_tokens=pad_to,
        bos=bos,
        as_prompt=True,
    )
    compressor = PublishedKVMemory(config, reader)
    drop_idle(compressor.encoder, lora, source)  # type: ignore[arg-type]
    fill_lora(compressor.encoder, lora, path)  # type: ignore[arg-type]
    with torch.no_grad():
        compressor.memory.copy_(memory)
    return compressor
