"""Gist tokens: a passage's keys and values at a few tokens behind it, which the rest of the prompt sees in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..encoders.lora_twin import tune
from ..reader.reader import Reader
from ..registry import register_compressor
from .encode import drop_idle_lora
from .memory_slots import KVSlotCompressor, KVSlotConfig

_ROWS = 8192  # of the embedding table taken at a time


@dataclass
class GistConfig(KVSlotConfig):
    """Settings of gist tokens. ``GistConfig.faithful()`` gives the paper's form."""

    method: ClassVar[str] = "gist"
    most_field: ClassVar[str] = "n_gist"

    n_gist: int = field(default=10, metadata={"help": "gist tokens, and the most slots that a segment gets"})
    shared_embedding: bool = field(
        default=True, metadata={"help": "one embedding for all gist tokens, as in the paper; false: one for each"}
    )
    tuning: Literal["lora", "full", "none"] = field(
        default="lora",
        metadata={
            "help": "tune the model with LoRA, or a full copy of it (the paper); 'none': the reader is tuned already (imported "
            "checkpoints), and only gist embeddings train"
        },
    )
    adapt_reader: bool = field(
        default=True,
        metadata={"help": "the tuned model reads too, as in the paper; false: the reader as it was given reads"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning not in ("lora", "full", "none"):
            raise ValueError(f"tuning must be 'lora', 'full' or 'none', got {self.tuning!r}.")

    @classmethod
    def faithful(cls, **changes: Any) -> GistConfig:
        """The paper's form: every passage gets n_gist tokens of one embedding, and the whole model is tuned and reads."""
        return cls(**{"fixed_slots": True, "tuning": "full", **changes})


@register_compressor
class GistCompressor(KVSlotCompressor):
    """Gist tokens (Mu et al., arXiv 2304.08467).

    The tuned model reads ``[BOS][passage][gist tokens]``; the slots are its keys and values of every layer at the gist
    tokens. With ``adapt_reader`` (the paper) the same tuned model reads them, as ``compressor.reader``, in front of, between
    or behind any text. That equals one pass over everything under the gist mask, so
    training through stored slots is the paper's training.

    Without a ratio every passage gets ``n_gist`` gist tokens, but never more than it has tokens of its own. With a ratio a
    passage of L tokens is cut into ``n = ceil(L / (n_gist * ratio))`` segments of ``ceil(L / n)`` tokens, read each on its
    own, and a segment of S tokens gets ``ceil(S / ratio)``. Gist embeddings start as the mean row of the embedding table.

    Beyond the paper: LoRA in place of tuning every weight, ratios, segments, and ``fixed_slots=True`` for the paper's fixed
    number, which makes a passage of three tokens grow. The prompt's own BOS and text stay visible beside the gist; in the
    paper all that stands before the gist is hidden, but there the gist covers all of it.

    Args:
        config: the settings.
        reader: the reader, which stays as it is.

    Attributes:
        encoder: the tuned model, a `LoRATwin` or `FullTwin` of the reader's.
        gist: ``[1 or n_gist, width]`` gist embeddings.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    config_class = GistConfig
    config: GistConfig

    def __init__(self, config: GistConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = tune(reader.model, config.tuning, **config.lora)
        if config.adapt_reader and config.tuning != "none":
            self.adapt_reader(self.encoder)
        else:
            drop_idle_lora(self.encoder)
        self.gist = nn.Parameter(mean_row(reader).repeat(1 if config.shared_embedding else config.n_gist, 1))

    def memory_rows(self) -> Tensor:
        """``[n_gist, width]`` gist embeddings."""
        return self.gist.expand(self.config.n_gist, -1)


@torch.no_grad()
def mean_row(reader: Reader) -> Tensor:
    """``[width]`` float32: the mean of all token embeddings, scaled as the model's module scales them."""
    table = reader.model.get_input_embeddings().weight
    ids = torch.arange(table.shape[0], device=table.device)
    total = torch.stack([reader.embed(part).float().sum(0) for part in ids.split(_ROWS)]).sum(0)
    return total / len(ids)
