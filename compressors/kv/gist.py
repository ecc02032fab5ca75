"""Gist tokens: keys and values of a few tokens after a passage, which the rest of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import check_choices, check_counts, setting
from ..encoders.lora_twin import tune
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..registry import register_compressor
from .encode import drop_idle_lora
from .memory_slots import KVSlotCompressor, KVSlotConfig

_ROWS = 8192  # rows of the embedding table per step


@dataclass
class GistConfig(KVSlotConfig):
    """Settings of gist tokens."""

    method: ClassVar[str] = "gist"
    title: ClassVar[str] = "gist tokens"

    n_gist: int = setting(10, "gist tokens: the most slots of a segment")
    shared_embedding: bool = setting(True, "one embedding for all gist tokens, as in the paper; false: one each")
    tuning: Literal["lora", "full", "none"] = setting(
        "lora", "tune the model with LoRA, or a full copy (the paper), or train the gist embeddings only ('none')"
    )
    adapt_reader: bool = setting(
        True, "the tuned model also reads the slots, as in the paper; false: the plain reader does"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"n_gist": 1})
        check_choices(self, {"tuning": ("lora", "full", "none")})


@register_compressor
class GistCompressor(KVSlotCompressor):
    """Gist tokens (Mu et al., arXiv 2304.08467).

    The tuned model reads ``[BOS][segment][gist tokens]``. The slots are its keys and values of every layer at the gist tokens.
    With ``adapt_reader`` (the paper) the same tuned model reads them, as ``compressor.reader``. That equals one pass over
    everything under the gist mask, so training through stored slots is the paper's training.

    Without a ratio a passage gets ``n_gist`` gist tokens, but never more than it has tokens. Gist embeddings start as the mean
    row of the embedding table.

    Beyond the paper: LoRA, ratios and segments. The prompt's BOS and the text before the gist stay visible; the paper hides all
    of it, because there the gist covers all of it.

    Attributes:
        encoder: the tuned model, a `LoRATwin` or `FullTwin` of the reader's.
        gist: ``[1 or n_gist, width]`` gist embeddings.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    config_class: ClassVar[type[GistConfig]] = GistConfig
    config: GistConfig

    def __init__(self, config: GistConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = tune(reader.model, config.tuning, **config.lora)
        if config.adapt_reader and config.tuning != "none":
            self.adapt_reader(AdaptedReader(reader, self.encoder))
        else:
            drop_idle_lora(self.encoder)
        self.gist = nn.Parameter(mean_row(reader).repeat(1 if config.shared_embedding else config.n_gist, 1))

    @property
    def most_slots(self) -> int:
        """Gist tokens."""
        return self.config.n_gist

    def memory_embeddings(self) -> Tensor:
        """``[1 or n_gist, width]``."""
        return self.gist


@torch.no_grad()
def mean_row(reader: Reader) -> Tensor:
    """``[width]`` float32: mean of all token embeddings, as the model scales them."""
    table = reader.model.get_input_embeddings().weight
    ids = torch.arange(table.shape[0], device=table.device)
    total = torch.stack([reader.embed(part).float().sum(0) for part in ids.split(_ROWS)]).sum(0)
    return total / len(ids)
