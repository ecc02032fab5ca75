"""Salient windows: the tokens most worth keeping are read as they are, each with something of what stands before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from .base import CompressorConfig, Query, SoftCompressor
from .checks import check_choices, check_counts, check_ratio
from .embedders import MINILM
from .llmlingua2 import LLMLingua2Compressor, LLMLingua2Config
from .lora_settings import LoRASettings, lora_rank
from .passage import CompressedPassage, Interface
from .reader import Reader
from .registry import load_compressor, register_compressor
from .scoring import batches, padding_share
from .segments import slots_for
from .token_classifier import LoRATagger, pad_rows
from .word_merge import MERGES, spread_over_words

_POSITIONS = 16384  # of the classifier in one pass
_SHARPNESS = 4.0  # at first: a token half as likely to be worth keeping has a sixteenth of the weight
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
            shared = (
                "encoder",
                "frozen_hash",
                "merge",
                "window",
                "query_aware",
                "r",
                "alpha",
                "dropout",
                "target_modules",
            )
            config = replace(config, **{name: getattr(tagger.config, name) for name in shared})
        super().__init__(config, reader)
        self.query_aware = config.query_aware
        self.words = LLMLingua2Compressor(
            LLMLingua2Config(
                encoder=config.encoder,
                frozen_hash=config.frozen_hash,
                merge=config.merge,  # type: ignore[arg-type]
                window=config.window,
                query_aware=config.query_aware,
                **config.lora,  # type: ignore[arg-type]
            ),
            reader,
        )
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
        ids = self.reader.tokenize_batch(texts)
        read = [i for i, passage in enumerate(ids) if passage]
        slots: dict[int, Tensor] = {}
        for i, (states, odds, worth) in zip(read, self._scored([texts[i] for i in read], [queries[i] for i in read])):
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

    def _scored(self, texts: list[str], queries: list[str | None]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each passage, of the reader's tokens: the classifier's states ``[tokens, size]``, log-odds and probabilities."""
        words, device, dtype = self.words, self.reader.device, self.linear.weight.dtype
        tagger = cast(LoRATagger, words.tagger)
        read = [words.rows(text, query) for text, query in zip(texts, queries, strict=True)]
        after = words.pieces.after
        rows = [[*head, *pieces.ids[a:b], *after] for pieces, ranges, head in read for a, b in ranges]
        hidden: dict[int, Tensor] = {}
        for batch in batches([len(row) for row in rows], _POSITIONS, padding_share(words.device)):
            ids, mask = pad_rows([rows[i] for i in batch], words.pieces.pad)
            states = tagger.states(ids.to(words.device), mask.to(words.device))
            hidden.update(zip(batch, states))
        out, row = [], 0
        for text, (pieces, ranges, head) in zip(texts, read):
            parts = []
            for a, b in ranges:
                parts.append(hidden[row][len(head) : len(head) + b - a])
                row += 1
            states = torch.cat(parts) if parts else torch.zeros(0, self.norm.normalized_shape[0], device=words.device)
            logits = tagger.head(states.to(tagger.head.weight.dtype)).float()
            odds = logits[:, 1] - logits[:, 0]
            worth = spread_over_words(odds.detach().sigmoid().cpu(), pieces.words, self.config.merge).to(odds.device)
            columns = torch.cat([states.float(), odds[:, None], worth[:, None]], dim=1).to(device, dtype)
            found, seen = averaged(columns, pieces.offsets, self.reader.tokenize_with_offsets(text)[1], len(text))
            unseen = ~seen
            odds = torch.where(unseen, _UNSEEN, found[:, -2])
            out.append((found[:, :-2], odds, torch.where(unseen, -1.0, found[:, -1]).detach()))
        return out


def averaged(
    values: Tensor, spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], characters: int
) -> tuple[Tensor, Tensor]:
    """Values of one tokenizer's tokens carried over to another's, by the characters that they share.

    Args:
        values: ``[tokens, size]``.
        spans: ``(start, end)`` characters of each of these tokens.
        wanted: characters of the other tokenizer's tokens.
        characters: length of the text.

    Returns:
        ``[wanted, size]`` means over each wanted token's characters, and ``[wanted]`` whether there was anything to average
        (white space, say, belongs to no token of BERT's); zeros where there was not.
    """
    device = values.device
    owner = torch.full((characters,), -1, device=device)
    lengths = torch.tensor([b - a for a, b in spans], dtype=torch.long, device=device)
    starts = torch.tensor([a for a, _ in spans], dtype=torch.long, device=device)
    owner[_ranges(starts, lengths)] = torch.repeat_interleave(torch.arange(len(spans), device=device), lengths)
    lengths = torch.tensor([b - a for a, b in wanted], dtype=torch.long, device=device)
    starts = torch.tensor([a for a, _ in wanted], dtype=torch.long, device=device)
    token = torch.repeat_interleave(torch.arange(len(wanted), device=device), lengths)
    source = owner[_ranges(starts, lengths)]
    token, source = token[source >= 0], source[source >= 0]
    total = values.new_zeros(len(wanted), values.shape[1]).index_add(0, token, values[source])
    count = torch.bincount(token, minlength=len(wanted))
    return total / count.clamp(min=1)[:, None], count > 0


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers of all ranges ``[start, start + length)``, one range after the other."""
    if not len(lengths):
        return starts
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + torch.repeat_interleave(starts - first, lengths)
