"""Salient windows: one slot per token worth keeping, which also holds some of the text before it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.passage import Interface
from ..encoders.token_classifier import LoRATagger, TokenClassifier, TokenClassifierSettings, spread_over_words
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import averaged
from ..slots.projector import WindowProjector
from ..slots.segments import slots_for

_SHARPNESS = 4.0  # initial: a token with half the odds has a sixteenth of the weight
_UNSEEN = -10.0  # log-odds of tokens without a classifier token, such as white space


@dataclass
class SalientPoolConfig(CompressorConfig, TokenClassifierSettings):
    """Settings of salient windows."""

    method: ClassVar[str] = "salient-pool"
    title: ClassVar[str] = "salient windows"
    cost: ClassVar[str] = "states"

    ratio: float = setting(4.0, "tokens per slot if no ratio is asked for")
    query_aware: bool = setting(False, "the classifier reads the question before the passage")
    hidden_size: int | None = setting(
        None, "width of the MLP's hidden layer; default: twice the reader's embedding width"
    )

    def __post_init__(self) -> None:
        check_counts(self, {"hidden_size": 1}, ("hidden_size",))
        check_ratio(self.ratio, "tokens per slot")
        self.check_classifier()


@register_compressor
class SalientPoolCompressor(SoftCompressor, WindowProjector):
    r"""Windows around the tokens most worth keeping: LLMLingua-2's choice, with soft slots instead of a shorter text.

    A passage of L tokens has ``n = ceil(L / ratio)`` slots. A token classifier (arXiv 2403.12968) gives each token a
    probability p of being worth keeping. The n tokens of the most probable words are the anchors. Window k reaches from
    after anchor k - 1 to anchor k, the last one to the end. A `WindowProjector` pools the windows, with log-odds
    :math:`z = \log p / (1 - p)`, the classifier's last states and the weights

    .. math:: w = \mathrm{softmax}_{t \in window}(\beta z_t),\ w_t \le w_{anchor}.

    :math:`\beta` starts at 4: before training with the reader a slot is its anchor's embedding plus a little of its
    neighbours, read like LLMLingua-2's text of as many tokens. Training adds the rest of the window. Slots go where the
    content is, as in arXiv 2502.11493 (which assigns them to chunks by perplexity and attention). With ``query_aware`` they
    go where the answer may be. The method is this package's own.

    Args:
        config: the settings; those of the classifier come from ``tagger`` if it is given.
        reader: the reader.
        tagger: a trained `TokenClassifier` to start from, or a compressor that holds one as ``words`` (LLMLingua-2). Its
            weights are copied.

    Attributes:
        words: the `TokenClassifier`; its LoRA and head are trained and saved with this module.
        sharpness: beta.

    Raises:
        ValueError: if the tagger cannot be trained, or the frozen encoder is not the one of training.
    """

    config_class = SalientPoolConfig
    interface: ClassVar[Interface] = "embeds"
    config: SalientPoolConfig

    def __init__(self, config: SalientPoolConfig, reader: Reader, *, tagger: Any = None) -> None:
        given = getattr(tagger, "words", tagger)
        if given is not None:
            if not isinstance(given, TokenClassifier) or given.tagger is None:
                raise ValueError(
                    "tagger must be a loaded LLMLingua-2 with its own LoRA and head (load_compressor), not "
                    f"{type(tagger).__name__} or a whole classifier."
                )
            shared = {f.name: getattr(given.settings, f.name) for f in fields(TokenClassifierSettings)}
            config = replace(config, **shared, query_aware=given.query_aware)
        super().__init__(config, reader)
        self.words = TokenClassifier(config, reader.device, query_aware=config.query_aware)
        if given is not None:
            self.words.load_state_dict(given.state_dict())
        self.config = replace(config, frozen_hash=self.words.frozen_hash)
        self.add_projector(reader, self.words.frozen.config.hidden_size, config.hidden_size)
        self.sharpness = nn.Parameter(torch.tensor(_SHARPNESS))
        self.to(reader.device)

    def encode_passages(self, passages: Passages, ratio: float | None) -> list[Tensor]:
        """``[slots, width]`` per passage, differentiable except for the choice of anchors."""
        reader = self.reader
        read = [i for i, ids in enumerate(passages.ids) if ids]
        texts, queries = [passages.texts[i] for i in read], [passages.queries[i] for i in read]
        slots = [torch.zeros(0, reader.width, device=reader.device, dtype=reader.dtype)] * len(passages.ids)
        for i, (states, odds, worth) in zip(read, self._scored(texts, queries)):
            ids = torch.tensor(passages.ids[i], device=states.device)
            slots[i] = self._slots(ids, states, odds, worth, ratio or self.config.ratio)
        return slots

    def _slots(self, ids: Tensor, states: Tensor, odds: Tensor, worth: Tensor, ratio: float) -> Tensor:
        """``[slots, width]`` of one passage from its tokens' ids, states, log-odds and (words') probabilities."""
        n = slots_for(len(ids), ratio, len(ids))
        anchors = worth.argsort(descending=True, stable=True)[:n].sort().values
        where = torch.searchsorted(anchors, torch.arange(len(ids), device=ids.device)).clamp(max=n - 1)
        with torch.no_grad():
            embeds = self.reader.embed(ids).to(self.linear.weight.dtype)
        # No neighbour outweighs its anchor, whose word was chosen as a whole.
        score = self.sharpness * torch.minimum(odds, odds[anchors][where])
        power = (score - score[anchors].detach()[where]).exp()
        weights = power / power.new_zeros(n).index_add(0, where, power)[where]
        return self.pool_windows(embeds, states, weights, where, n).to(self.reader.dtype)

    def _scored(self, texts: list[str], queries: list[str | None]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per passage, at the reader's tokens: states ``[tokens, size]``, log-odds and probabilities of words."""
        tagger, dtype = cast(LoRATagger, self.words.tagger), self.linear.weight.dtype
        out = []
        read = self.words.read(texts, queries, lambda rows: self.words.run_rows(rows, tagger.states))
        for text, (pieces, parts) in zip(texts, read):
            states = (
                torch.cat(parts) if parts else torch.zeros(0, *self.norm.normalized_shape, device=self.words.device)
            )
            logits = tagger.head(states.to(tagger.head.weight.dtype)).float()
            odds = logits[:, 1] - logits[:, 0]
            worth = spread_over_words(odds.detach().sigmoid().cpu(), pieces.word_ids, self.config.merge).to(odds.device)
            columns = torch.cat([states.float(), odds[:, None], worth[:, None]], dim=1).to(self.reader.device, dtype)
            wanted = self.reader.tokenize_with_offsets(text)[1]
            found, seen = averaged(columns, pieces.offsets, wanted, len(text))
            odds = torch.where(seen, found[:, -2], _UNSEEN)
            out.append((found[:, :-2], odds, torch.where(seen, found[:, -1], -1.0).detach()))
        return out
