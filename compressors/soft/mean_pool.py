"""Mean-pooled windows: the states of a few neighbouring tokens, averaged and projected, are read in the tokens' place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.batching import pack, pass_positions
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import CompressedPassage, Interface
from ..encoders.embedder import MINILM, Embedder, load_embedder
from ..encoders.lora import LoRASettings, ReaderTuningSettings, lora_rank, tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import averaged
from ..slots.question import QuerySettings, question_ids
from ..slots.segment_overlap import OverlapSettings, in_front, overlaps
from ..slots.segments import equal_lengths


@dataclass
class MeanPoolConfig(CompressorConfig, LoRASettings, QuerySettings, ReaderTuningSettings, OverlapSettings):
    """Settings of mean-pooled windows."""

    method: ClassVar[str] = "mean-pool"

    encoder: Literal["reader", "embeddings", "minilm"] = field(
        default="reader",
        metadata={
            "help": "whose token states are pooled: 'reader': the reader plus LoRA; 'embeddings': the reader's token "
            "embeddings; 'minilm': a frozen small sentence-transformers model, which reads in both directions"
        },
    )
    ratio: float = field(default=4.0, metadata={"help": "tokens a window, where no ratio is asked for"})
    weighting: Literal["uniform", "learned"] = field(
        default="uniform",
        metadata={
            "help": "weights inside a window: equal, or a softmax over a learned score of each vocabulary entry plus a "
            "linear score of the state, which starts equal"
        },
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the MLP's hidden layer; default: twice the reader's embedding width"}
    )
    chunk_tokens: int = field(
        default=1024, metadata={"help": "the longest stretch that encoder 'reader' reads at once"}
    )
    bos: bool = field(
        default=True, metadata={"help": "put the tokenizer's BOS, if it has one, in front of every stretch"}
    )
    r: int = lora_rank(32, " (encoder 'reader')")
    embedder: str = field(
        default=MINILM, metadata={"help": "sentence-transformers id or folder of the frozen encoder ('minilm')"}
    )
    state_size: int | None = field(default=None, metadata={"help": "width of its token states; filled in"})
    embedder_hash: str | None = field(default=None, metadata={"help": "its fingerprint; filled in"})

    def __post_init__(self) -> None:
        optional = ("hidden_size", "state_size")
        check_counts(self, {"chunk_tokens": 1, "hidden_size": 1, "state_size": 1}, optional)
        check_ratio(self.ratio, "tokens a window")
        check_choices(self, {"encoder": ("reader", "embeddings", "minilm"), "weighting": ("uniform", "learned")})
        self.check_lora()
        self.check_query()
        self.check_reader_tuning()
        self.check_overlap()
        if self.query_aware and self.encoder != "reader":
            raise ValueError(f"encoder={self.encoder!r} cannot read a question: query_aware needs encoder='reader'.")
        if self.segment_overlap and self.encoder != "reader":
            raise ValueError(f"encoder={self.encoder!r} reads no overlap: segment_overlap needs encoder='reader'.")


@register_compressor
class MeanPoolCompressor(SoftCompressor):
    r"""Mean-pooled windows (as in arXiv 2510.20797 and LCLM, arXiv 2606.09659), read by the reader as it is.

    A passage of L tokens is cut into ``n = ceil(L / ratio)`` windows: window k is the reader's tokens from
    ``floor(k * ratio)`` up to ``floor((k + 1) * ratio)``, the last one shorter. With weights :math:`w` that add up to 1 in
    each window, token states :math:`h` and the reader's token embeddings :math:`e`,

    .. math:: slot_k = A \frac{\sum_t w_t e_t}{\sqrt{\sum_t w_t^2}}
              + s \cdot \mathrm{MLP}\big(\mathrm{RMSNorm}(\sum_t w_t h_t)\big).

    A starts as the identity and the MLP's last layer at zero, so training begins with the window's embeddings, summed over
    the square root of their number, which keeps their norm; at ratio 1 these are the passage's own embeddings. s is a
    learned factor that starts at the root mean square of the reader's embeddings. The weights are 1 over the window's
    length, or learned: a softmax over the window of a score of the token's vocabulary entry plus a linear score of its
    state, both zero at first. Nothing depends on the ratio, so one checkpoint serves every ratio: train it on random ones.

    The papers' encoders read in both directions. A causal reader cannot: with ``encoder="reader"`` a token's state knows
    what comes before it in its stretch of ``chunk_tokens`` tokens (and in the ``segment_overlap`` tokens in front of it), and
    nothing after it. ``"minilm"`` reads in both directions; its tokens are aligned with the reader's by their characters.
    Windows cross the borders of stretches.

    Args:
        config: the settings.
        reader: the reader.
        embedder: for ``encoder="minilm"`` an embedder or a SentenceTransformer in place of loading ``config.embedder``. It
            must be the one that the compressor was trained with.

    Attributes:
        encoder: the reader's `LoRATwin` (``encoder="reader"`` only).
        linear: A, ``[width, width]``.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
        norm, mlp: the RMSNorm over pooled states, and Linear, GELU, Linear from its output to ``width``.
        log_scale: logarithm of s.
        token_score: ``[vocabulary]``; `state_score`: linear, from a state to a number (``weighting="learned"`` only).
        batch_positions: positions that one forward pass of the encoder may take (memory against speed; changes no result).

    Raises:
        ValueError: if the embedder is not the one that the compressor was made with, or the reader has too few positions.
    """

    config_class = MeanPoolConfig
    interface: ClassVar[Interface] = "embeds"
    config: MeanPoolConfig

    def __init__(self, config: MeanPoolConfig, reader: Reader, *, embedder: Any = None) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self._embedder: Embedder | None = None
        if embedder is not None and config.encoder != "minilm":
            raise ValueError(
                f"encoder={config.encoder!r} uses no embedder; leave embedder out, or set encoder='minilm'."
            )
        self.encoder: LoRATwin | None = None
        self.bos: list[int] = list(reader.bos_ids) if config.bos else []
        size = reader.width
        if config.encoder == "reader":
            self.encoder = LoRATwin(reader.model, **config.lora)
            if reader.max_positions is not None and reader.max_positions <= len(self.bos):
                raise ValueError(f"{reader.name!r} has {reader.max_positions} positions, none of them for a passage.")
            self._longest_stretch(overlap=config.segment_overlap)
            with torch.no_grad():  # the width of hidden states, which is not that of the embeddings in every model
                size = self._encode([[0]])[0].shape[1]
        elif config.encoder == "minilm":
            size = self._use_embedder(embedder)
        hidden = config.hidden_size or 2 * reader.width
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, reader.width))
        self.linear = nn.Linear(reader.width, reader.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(reader.embedding_norm / math.sqrt(reader.width))))
        self.token_score = self.state_score = None
        if config.weighting == "learned":
            self.token_score = nn.Parameter(torch.zeros(reader.vocab_size))
            self.state_score = nn.Linear(size, 1, bias=False)
            nn.init.zeros_(self.state_score.weight)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]
        self.to(reader.device)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """The slots depend on the reader's weights and on the embedder's too."""
        return [self.base_reader.fingerprint, self.config.embedder_hash]

    def _use_embedder(self, given: Any) -> int:
        """Loads the frozen encoder, or checks the one that is given; its width."""
        config = self.config
        self._embedder = load_embedder(given if given is not None else config.embedder, self.reader.device)
        found, size = self._embedder.fingerprint, self._embedder.token_states(["a"])[0][1].shape[1]
        if config.embedder_hash not in (None, found):
            raise ValueError(
                f"The embedder {self._embedder.name!r} ({found}) is not the one this compressor was made with "
                f"({config.embedder!r}, {config.embedder_hash}); pass that one as embedder=..., or train a compressor for "
                "this one."
            )
        self.config = replace(config, embedder_hash=found, state_size=size)
        return size

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in the LoRA matrices, the projector and the window weights.

        Args:
            texts: the passages.
            query: what is asked of each passage (``query_aware=True``): every stretch is read behind it, and a passage
                without a question alone. Otherwise ignored: the slots serve all questions.
            ratio: tokens a window, any real number of at least 1; ``None``: the config's.
            vectors: ignored.
        """
        texts = self._check_texts(texts)
        ratio = self.config.ratio if ratio is None else float(ratio)
        asked = question_ids(self.config, self.reader.prompts, self._check_query(query, len(texts)))
        ids = self.reader.tokenize_batch(texts)
        lengths = [window_lengths(len(passage), ratio) for passage in ids]
        windows = [n for passage in lengths for n in passage]
        rows = self._slots(texts, ids, asked, windows).split([len(w) for w in lengths])
        origin = self.origin
        info = {"method": "mean-pool", "ratio_asked": ratio, **self.reader.identity_card.runs_as}
        return [
            CompressedPassage("embeds", len(p), origin, self.reader.fingerprint, embeds=e, info=dict(info))
            for p, e in zip(ids, rows if ids else ())
        ]

    def _slots(self, texts: list[str], ids: list[list[int]], asked: list[list[int]], windows: list[int]) -> Tensor:
        """``[windows, width]`` slots of all passages, one after the other, from their windows' lengths."""
        reader, dtype = self.reader, self.linear.weight.dtype
        device = reader.device
        if not windows:
            return torch.zeros(0, reader.width, device=device, dtype=reader.dtype)
        flat = torch.tensor([i for passage in ids for i in passage], device=device)
        with torch.no_grad():
            embeds = reader.embed(flat).to(dtype)
        states = embeds if self.config.encoder == "embeddings" else self._states(texts, ids, asked).to(device, dtype)
        n = len(windows)
        where = torch.repeat_interleave(torch.arange(n), torch.tensor(windows)).to(device)
        weights = self._weights(flat, states, where, n)
        pooled = embeds.new_zeros(n, embeds.shape[1]).index_add(0, where, embeds * weights[:, None])
        length = weights.new_zeros(n).index_add(0, where, weights.square()).sqrt()
        means = states.new_zeros(n, states.shape[1]).index_add(0, where, states * weights[:, None])
        out = self.linear(pooled / length[:, None]) + self.mlp(self.norm(means)) * self.log_scale.exp()
        return out.to(reader.dtype)

    def _weights(self, ids: Tensor, states: Tensor, where: Tensor, n: int) -> Tensor:
        """``[tokens]`` weights that add up to 1 in each of the ``n`` windows."""
        if self.token_score is None or self.state_score is None:
            return 1 / torch.bincount(where, minlength=n).to(states.dtype)[where]
        normed = nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)
        scores = self.token_score[ids] + self.state_score(normed)[:, 0]
        highest = scores.detach().new_full((n,), -math.inf).scatter_reduce(0, where, scores.detach(), "amax")
        powers = (scores - highest[where]).exp()
        return powers / powers.new_zeros(n).index_add(0, where, powers)[where]

    # -- token states ----------------------------------------------------------------------------------------------

    def _states(self, texts: list[str], ids: list[list[int]], asked: list[list[int]]) -> Tensor:
        """``[tokens, state width]``: a state for every reader token of every passage."""
        if self.encoder is None:
            return torch.cat([self._aligned(text) for text, passage in zip(texts, ids) if passage])
        pieces: list[list[int]] = []
        heads: list[list[int]] = []
        for passage, question in zip(ids, asked):
            longest = self._longest_stretch(len(question))
            if len(passage) > longest:
                longest = self._longest_stretch(len(question), self.config.segment_overlap)
            lengths = equal_lengths(len(passage), longest)
            pieces += [passage[end - n : end] for n, end in zip(lengths, accumulate(lengths))]
            heads += [question + again for again in overlaps(passage, lengths, self.config.segment_overlap)]
        return torch.cat(self._encode(pieces, heads))

    def _longest_stretch(self, question_tokens: int = 0, overlap: int = 0) -> int:
        """Tokens that are read at once behind a question and overlap. Raises ``ValueError`` if they leave no room for any."""
        if self.reader.max_positions is None:
            return self.config.chunk_tokens
        room = self.reader.max_positions - len(self.bos) - question_tokens - overlap
        if room < 1:
            words, advice = in_front(question_tokens, overlap)
            raise ValueError(
                f"There is no room for a passage behind {' and '.join(words)} in the {self.reader.max_positions} positions of "
                f"{self.reader.name!r}; {' or '.join(advice)}."
            )
        return min(self.config.chunk_tokens, room)

    def _encode(self, pieces: Sequence[list[int]], heads: Sequence[list[int]] | None = None) -> list[Tensor]:
        """For each stretch of ids the tuned reader's last hidden states ``[tokens, hidden]``, behind BOS and its head."""
        reader = self.reader
        fronts = [self.bos + head for head in heads or [[]] * len(pieces)]
        lengths = [len(front) + len(piece) for front, piece in zip(fronts, pieces)]
        out: dict[int, Tensor] = {}
        for batch in pack(lengths, self.batch_positions, pass_positions(reader.device)):
            longest = lengths[batch[0]]
            rows = torch.tensor([fronts[i] + pieces[i] + [0] * (longest - lengths[i]) for i in batch]).to(reader.device)
            # Nothing of a causal model looks at padding on the right, and without a mask attention is faster.
            hidden = self.encoder(reader.embed(rows), torch.ones_like(rows))  # type: ignore[misc]
            out.update((i, hidden[row, len(fronts[i]) : lengths[i]]) for row, i in enumerate(batch))
        return [out[i] for i in range(len(pieces))]

    def _aligned(self, text: str) -> Tensor:
        """``[reader tokens, state width]``: the mean of the embedder's states over each reader token's characters.

        A reader token that the embedder has nothing for (white space, say) gets a state of zeros.
        """
        embedder: Any = self._embedder
        spans = embedder.shard(text, embedder.max_tokens)
        found: list[Tensor] = [torch.zeros(0, self.config.state_size or 0)]
        places: list[tuple[int, int]] = []
        for (start, _), (offsets, states) in zip(spans, embedder.token_states([text[a:b] for a, b in spans])):
            places += [(start + a, start + b) for a, b in offsets]
            found.append(states)
        return averaged(torch.cat(found), places, self.reader.tokenize_with_offsets(text)[1], len(text))[0]


def window_lengths(n_tokens: int, ratio: float) -> list[int]:
    """Lengths of the windows of a passage: borders at ``floor(k * ratio)``, the last window shorter."""
    if not n_tokens:
        return []
    count = max(math.ceil(n_tokens / ratio - 1e-6), 1)
    borders = [min(math.floor(k * ratio + 1e-6), n_tokens) for k in range(count)] + [n_tokens]
    return [b - a for a, b in zip(borders, borders[1:])]
