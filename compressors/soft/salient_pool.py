"""Salient windows: the tokens most worth keeping are read as they are, each with something of what stands before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.batching import batches, pad_rows, padding_share, positions_per_pass
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import CompressedPassage, Interface
from ..encoders.embedder import MINILM
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.token_classifier import LoRATagger
from ..encoders.word_merge import MERGES, spread_over_words
from ..loading import load_compressor
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import averaged
from ..slots.segments import slots_for
from ..text.llmlingua2 import LLMLingua2Compressor, LLMLingua2Config

_SHARPNESS = 4.0  # at first: a token half as likely to be worth keeping has a sixteenth of the weight
# What the classifier is made of: settings of both configs.
_SHARED = (
    *("encoder", "frozen_hash", "merge", "window", "query_aware"),
    *("r", "alpha", "dropout", "target_modules"),
)
_UNSEEN = -10.0  # log-odds of tokens that the classifier has nothing for, such as white space


@dataclass
class SalientPoolConfig(CompressorConfig, LoRASettings):
    """Settings of salient windows. Those of the classifier are as in `LLMLingua2Config`."""

    method: ClassVar[str] = "salient-pool"

    ratio: float = field(default=4.0, metadata={"help": "tokens a slot, where no ratio is asked for"})
    query_aware: bool = field(
        default=False, metadata={"help": "the classifier reads the question in front of the passage"}
    )
    encoder: str = field(default=MINILM, metadata={"help": "the classifier's frozen encoder"})
    frozen_hash: str | None = field(default=None, metadata={"help": "hash of its weights and tokenizer; filled in"})
    merge: str = field(
        default="mean", metadata={"help": "a word's probability: its tokens' 'mean', or that of the 'first'"}
    )
    window: int = field(default=512, metadata={"help": "longest row that the classifier reads"})
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the MLP's hidden layer; default: twice the reader's embedding width"}
    )
    r: int = lora_rank(16, " (the classifier's)")

    def __post_init__(self) -> None:
        check_counts(self, {"hidden_size": 1, "window": 8}, ("hidden_size",))
        check_ratio(self.ratio, "tokens a slot")
        check_choices(self, {"merge": MERGES})
        self.check_lora()


@register_compressor
class SalientPoolCompressor(SoftCompressor):
    r"""Windows around the tokens most worth keeping: LLMLingua-2's choice, with soft slots in place of a shorter text.

    A passage of L tokens has ``n = ceil(L / ratio)`` slots. A token classifier (that of `LLMLingua2Compressor`, arXiv
    2403.12968) gives every token a probability p of being worth keeping; the n tokens of the most probable words are the
    anchors, and window k is what stands behind anchor k - 1 up to anchor k (the last one goes to the end). With the reader's
    embeddings e, the classifier's last states h and log-odds :math:`z = \log p / (1 - p)`,

    .. math:: slot_k = A \frac{\sum_t w_t e_t}{\sqrt{\sum_t w_t^2}}
              + s \cdot \mathrm{MLP}\big(\mathrm{RMSNorm}(\sum_t w_t h_t)\big),
              \quad w = \mathrm{softmax}_{t \in window}(\beta z_t),\ w_t \le w_{anchor}.

    A starts as the identity, the MLP's last layer at zero and :math:`\beta` at 4, so that before any training with the
    reader a slot is its anchor's embedding with a trace of its neighbours: read like LLMLingua-2's text of as many tokens.
    Training with the reader then puts the rest of the window into the slot. Slots go where the content is, as in arXiv
    2502.11493 (which allots them to chunks by perplexity and attention), not evenly; the method is this package's own.

    With ``query_aware`` the classifier reads the question too, and slots go where the answer may be.

    Args:
        config: the settings; those of the classifier are taken from ``tagger`` where one is given.
        reader: the reader.
        tagger: a trained `LLMLingua2Compressor` (or its folder or hub id) to start from. Its weights are copied.

    Attributes:
        words: the `LLMLingua2Compressor` that scores tokens; its LoRA and head are this module's to train and save.
        linear: A, ``[width, width]``. norm, mlp: from the classifier's states to the reader's width.
        log_scale: logarithm of s. sharpness: beta.

    Raises:
        ValueError: if the tagger is none that can be trained, or the frozen encoder is not the one trained with.
    """

    config_class = SalientPoolConfig
    interface: ClassVar[Interface] = "embeds"
    config: SalientPoolConfig

    def __init__(
        self, config: SalientPoolConfig, reader: Reader, *, tagger: LLMLingua2Compressor | str | None = None
    ) -> None:
        if tagger is not None:
            given = load_compressor(tagger, reader) if isinstance(tagger, str) else tagger
            if not isinstance(given, LLMLingua2Compressor) or given.tagger is None:
                raise ValueError(
                    "tagger must be a LLMLingua-2 with LoRA and a head of its own, not a classifier given whole."
                )
            tagger = given
            config = replace(config, **{name: getattr(tagger.config, name) for name in _SHARED})
        super().__init__(config, reader)
        self.words = LLMLingua2Compressor(LLMLingua2Config(**{name: getattr(config, name) for name in _SHARED}), reader)
        if tagger is not None:
            self.words.load_state_dict(tagger.state_dict())
        self.config = replace(config, frozen_hash=self.words.config.frozen_hash)
        size = self.words.classifier[0].config.hidden_size
        hidden = config.hidden_size or 2 * reader.width
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, reader.width))
        self.linear = nn.Linear(reader.width, reader.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(reader.embedding_norm / math.sqrt(reader.width))))
        self.sharpness = nn.Parameter(torch.tensor(_SHARPNESS))
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]
        self.to(reader.device)

    def identity_parts(self) -> list[str]:
        """The slots depend on the reader's weights too."""
        return [self.reader.fingerprint]

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: object = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in all but the choice of anchors.

        Args:
            texts: the passages.
            query: one question for all or one each; read with ``query_aware`` alone, and needed there.
            ratio: tokens a slot, any real number of at least 1; ``None``: the config's.
            vectors: ignored.
        """
        texts = self._check_texts(texts)
        queries = self._check_query(query, len(texts))
        ratio = self.config.ratio if ratio is None else float(ratio)
        tokens = [self.reader.tokenize_with_offsets(text) for text in texts]
        ids = [found for found, _ in tokens]
        read = [i for i, passage in enumerate(ids) if passage]
        scored = self._scored([texts[i] for i in read], [queries[i] for i in read], [tokens[i][1] for i in read])
        slots: dict[int, Tensor] = {}
        for i, (states, odds, worth) in zip(read, scored):
            slots[i] = self._slots(torch.tensor(ids[i], device=states.device), states, odds, worth, ratio)
        empty = torch.zeros(0, self.reader.width, device=self.reader.device, dtype=self.reader.dtype)
        info = {"method": "salient-pool", "ratio_asked": ratio, **self.reader.identity_card.runs_as}
        origin, made_for = self.origin, self.reader.fingerprint
        return [
            CompressedPassage("embeds", len(p), origin, made_for, embeds=slots.get(i, empty), info=dict(info))
            for i, p in enumerate(ids)
        ]

    def _slots(self, ids: Tensor, states: Tensor, odds: Tensor, worth: Tensor, ratio: float) -> Tensor:
        """``[slots, width]`` of one passage from its tokens' ids, states, log-odds and (words') probabilities."""
        reader, dtype = self.reader, self.linear.weight.dtype
        n = slots_for(len(ids), ratio, len(ids))
        anchors = worth.argsort(descending=True, stable=True)[:n].sort().values
        where = torch.searchsorted(anchors, torch.arange(len(ids), device=ids.device)).clamp(max=n - 1)
        with torch.no_grad():
            embeds = reader.embed(ids).to(dtype)
        # No neighbour outweighs its anchor, whose word was chosen as a whole.
        score = self.sharpness * torch.minimum(odds, odds[anchors][where])
        power = (score - score[anchors].detach()[where]).exp()
        weights = power / power.new_zeros(n).index_add(0, where, power)[where]
        pooled = embeds.new_zeros(n, embeds.shape[1]).index_add(0, where, embeds * weights[:, None])
        length = weights.new_zeros(n).index_add(0, where, weights.square()).sqrt()
        means = states.new_zeros(n, states.shape[1]).index_add(0, where, states * weights[:, None])
        out = self.linear(pooled / length[:, None]) + self.mlp(self.norm(means)) * self.log_scale.exp()
        return out.to(reader.dtype)

    def _scored(
        self, texts: list[str], queries: list[str | None], offsets: list[list[tuple[int, int]]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each passage, of the reader's tokens at `offsets`: states ``[tokens, size]``, log-odds and probabilities."""
        words, device, dtype = self.words, self.reader.device, self.linear.weight.dtype
        tagger = cast(LoRATagger, words.tagger)
        read = [words.rows(text, query) for text, query in zip(texts, queries, strict=True)]
        rows = words.row_ids(read)
        hidden: dict[int, Tensor] = {}
        where = words.device
        for batch in batches([len(row) for row in rows], positions_per_pass(where), padding_share(where)):
            ids, mask = pad_rows([rows[i] for i in batch], words.pieces.pad)
            states = tagger.states(ids.to(words.device), mask.to(words.device))
            hidden.update(zip(batch, states))
        out = []
        found_rows = (hidden[i] for i in range(len(rows)))
        for text, wanted, (pieces, ranges, head) in zip(texts, offsets, read):
            parts = [next(found_rows)[len(head) :][: b - a] for a, b in ranges]
            states = torch.cat(parts) if parts else torch.zeros(0, self.norm.normalized_shape[0], device=words.device)
            logits = tagger.head(states.to(tagger.head.weight.dtype)).float()
            odds = logits[:, 1] - logits[:, 0]
            worth = spread_over_words(odds.detach().sigmoid().cpu(), pieces.words, self.config.merge).to(odds.device)
            columns = torch.cat([states.float(), odds[:, None], worth[:, None]], dim=1).to(device, dtype)
            found, seen = averaged(columns, pieces.offsets, wanted, len(text))
            odds = torch.where(seen, found[:, -2], _UNSEEN)
            out.append((found[:, :-2], odds, torch.where(seen, found[:, -1], -1.0).detach()))
        return out
