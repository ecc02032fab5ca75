"""KV-Distill: a scorer picks tokens of a passage, which LoRA repacks; their keys and values stand for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core.batching import SoftBatch
from ..core.config import check_counts, setting
from ..encoders.lora import lora_alpha
from ..encoders.lora_twin import LoRATwin, attention_inputs, attention_output
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.scorer import TokenScorer, best_tokens
from ..slots.segments import Segment
from .encode import drop_idle_lora
from .ragged import RaggedSlots
from .selected import SelectedConfig, SelectedTokenCompressor

_ALL_TOKENS = ("k_proj", "v_proj", "key", "value")  # modules whose LoRA acts on dropped tokens, too
_START = 4.0  # the first scores; their sigmoid is 0.98


@dataclass
class KVDistillConfig(SelectedConfig):
    """Settings of KV-Distill."""

    method: ClassVar[str] = "kv-distill"
    title: ClassVar[str] = "KV-Distill"
    cost: ClassVar[str] = "states"

    scorer_layers: int = setting(6, "layers of the reader whose states the scorer reads")
    first_tokens: int = setting(4, "first tokens of a passage that are always kept (the paper: fewer than 10)")
    alpha: float = lora_alpha(64.0)
    target_modules: tuple[str, ...] | None = setting(
        None, "modules that get LoRA; default: the projections of attention, of its input and its output", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"first_tokens": 0})


@register_compressor
class KVDistillCompressor(SelectedTokenCompressor):
    """KV-Distill (arXiv 2503.10337).

    The scorer picks tokens; the first few are always kept. The reader plus LoRA reads ``[BOS][segment]``: LoRA of queries and
    of the output projection acts on the kept tokens, which gather what the dropped ones hold; LoRA of keys and values acts on
    all. The kept tokens' keys and values of all layers are the slots, at the tokens' own positions; the reader, without
    LoRA, reads them. The attention scores of a slot are multiplied by the sigmoid of its token's score (here its keys are),
    so that the scorer learns. The paper's loss is the divergence both ways: objective ``kl`` with ``reverse_kl: 0.4``.

    Differences from the paper: scores start where the sigmoid is 0.98, and states enter the scorer at unit mean square.
    LoRA of a fused projection acts on kept tokens alone.

    Attributes:
        encoder: the reader's `LoRATwin`.
        scorer: the scorer.
    """

    config_class = KVDistillConfig
    config: KVDistillConfig

    def __init__(self, config: KVDistillConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        body = reader.model.get_decoder()
        targets = config.target_modules or (*attention_inputs(body, keys=True), attention_output(body))
        lora = config.lora
        lora["target_modules"] = targets
        self.encoder = LoRATwin(reader.model, **lora)
        drop_idle_lora(self.encoder)
        self.routed = [name for name in targets if name not in _ALL_TOKENS]
        self.scorer = TokenScorer(reader, config.scorer_layers, _START)

    def choose(self, scores: Tensor, slots: int) -> Tensor:
        """The best tokens and the first ones."""
        return best_tokens(scores, slots, first=self.config.first_tokens)

    def routing(
        self, batch: SoftBatch, chosen: Sequence[Tensor], segments: Sequence[Segment]
    ) -> AbstractContextManager:
        """LoRA of queries and outputs at kept tokens only."""
        where = torch.zeros_like(batch.mask, dtype=torch.bool)
        for row, i in enumerate(batch.which):
            where[row, chosen[i] + len(segments[i].front)] = True
        return self.encoder.only_at(where, self.routed)

    def finish(self, slots: RaggedSlots, scores: Tensor) -> RaggedSlots:
        """Keys times the sigmoid of their scores, which multiplies the attention scores."""
        share = scores.sigmoid()[:, None]
        return replace(slots, keys=tuple(keys * share.to(keys) for keys in slots.keys))
