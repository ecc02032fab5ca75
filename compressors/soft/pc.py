"""Prompt compression: free vectors, fitted to one passage by gradient descent until the reader predicts the same from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..base import Compressor, Query
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.passage import CompressedPassage, Interface
from ..objectives.fitting import EVERY, SlotFitter
from ..registry import register_compressor
from ..slots.pooling import summed_runs
from ..slots.segments import Segment, slots_for


@dataclass
class PCConfig(CompressorConfig):
    """Settings of prompt compression; it needs the reader alone, and no training data."""

    method: ClassVar[str] = "pc"
    title: ClassVar[str] = "PC"
    cost: ClassVar[str] = "fit"

    ratio: float = setting(4.0, "compression ratio if none is asked for")
    steps: int = setting(200, "the most steps of gradient descent")
    lr: float = setting(0.1, "learning rate, relative to the root mean square of a slot")
    probes: int = setting(12, "rule-made questions per passage; every fourth is held out for the early stop")
    patience: int = setting(4, f"checks, one every {EVERY} steps, without a gain after which a passage is done")
    together: int = setting(8, "passages fitted together, unless batch_size says otherwise")

    def __post_init__(self) -> None:
        check_counts(self, {"steps": 1, "probes": 0, "patience": 1, "together": 1})
        check_ratio(self.ratio)
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr!r}.")


@register_compressor
class PCCompressor(Compressor):
    r"""Prompt compression by gradient descent (PC, Wingate et al., arXiv 2210.03162), without training data.

    The slots of one passage are free vectors z, fitted so that the frozen reader predicts from them what it predicts from the
    text x (`SlotFitter`):

    .. math:: \min_z \sum_t D_{KL}(p(\cdot \mid x, q, a_{<t}) \,\|\, p(\cdot \mid z, q, a_{<t})).

    This is the upper bound of what any method to soft tokens can keep in as many slots. It costs up to ``steps`` passes
    forward and back per passage.

    The paper takes continuations from the Pile as (q, a). Here they are the passage itself after the request to repeat it, and
    rule-made questions about it, on which the passage matters at every token. Slots start as pooled token
    embeddings. Adafactor takes steps relative to the size of a slot. Every fourth question, or all probes if there are fewer,
    decides when to stop and which slots are the best. A passage's slots do not depend on the others in its batch.
    """

    config_class = PCConfig
    interface: ClassVar[Interface] = "embeds"
    training_free: ClassVar[bool] = True
    config: PCConfig

    def identity_parts(self) -> list[Any]:
        """The base reader, on which the slots depend."""
        return [self.base_reader.fingerprint]

    def compress(
        self, texts: Sequence[str], query: Query = None, ratio: float | None = None, **options: Any
    ) -> list[CompressedPassage]:
        """`Compressor.compress`, ``together`` passages at a time; ``progress=True`` shows how many are fitted."""
        options["batch_size"] = options.get("batch_size") or self.config.together
        return super().compress(texts, query, ratio, **options)

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        reader, config = self.base_reader, self.config
        ratio = ratio or config.ratio
        ids = reader.tokenize_batch(texts)
        slots = [slots_for(len(passage), ratio, len(passage)) for passage in ids]
        read = [i for i, passage in enumerate(ids) if passage]
        starts = summed_runs(reader.model.get_input_embeddings(), [Segment(ids[i], slots[i], []) for i in read])
        parts = starts.split([slots[i] for i in read])
        made = [torch.zeros(0, reader.width, device=reader.device)] * len(texts)
        if read:
            fitter = SlotFitter(reader, config.steps, config.lr, config.patience, config.probes)
            fits = [fitter.begin(texts[i], ids[i], start) for i, start in zip(read, parts)]
            for i, best in zip(read, fitter.fit(fits)):
                made[i] = best
        info = {"method": config.method, "ratio_asked": ratio, **reader.identity_card.runs_as}
        maker, made_for = self.fingerprint, reader.fingerprint
        return [
            CompressedPassage(self.interface, len(n), maker, made_for, embeds=best.to(reader.dtype), info=dict(info))
            for best, n in zip(made, ids)
        ]
