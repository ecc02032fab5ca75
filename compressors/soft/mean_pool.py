"""Mean-pooled windows: states of a few neighbouring tokens, averaged and projected, are one slot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import Interface
from ..encoders.embedder import MINILM, Embedder, load_embedder
from ..encoders.lora import LoRASettings, ReaderTuningSettings, lora_rank, tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import averaged, token_states
from ..slots.projector import WindowProjector
from ..slots.question import QuerySettings, question_ids
from ..slots.segments import Segment, equal_lengths, room_for_tokens, window_lengths


@dataclass
class MeanPoolConfig(LoRASettings, QuerySettings, ReaderTuningSettings, CompressorConfig):
    """Settings of mean-pooled windows."""

    method: ClassVar[str] = "mean-pool"
    retired: ClassVar[Mapping[str, Any]] = {"bos": True}
    retired_unhashed: ClassVar[Mapping[str, Any]] = {"segment_overlap": 0}

    encoder: Literal["reader", "embeddings", "minilm"] = field(
        default="reader",
        metadata={
            "help": "token states to pool: 'reader': of the reader plus LoRA; 'embeddings': the reader's token embeddings; "
            "'minilm': of a frozen small sentence-transformers model, which is bidirectional"
        },
    )
    ratio: float = field(default=4.0, metadata={"help": "tokens per window, if no ratio is asked for"})
    weighting: Literal["uniform", "learned"] = field(
        default="uniform",
        metadata={
            "help": "weights inside a window: equal, or a softmax over a learned score per vocabulary entry plus a linear "
            "score of the state, which starts equal"
        },
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the MLP's hidden layer; default: twice the reader's embedding width"}
    )
    chunk_tokens: int = field(default=1024, metadata={"help": "longest stretch that encoder 'reader' reads at once"})
    r: int = lora_rank(32, " (encoder 'reader')")
    embedder: str = field(
        default=MINILM, metadata={"help": "sentence-transformers id or folder of the frozen encoder ('minilm')"}
    )
    state_size: int | None = field(default=None, metadata={"help": "width of its token states; filled in"})
    embedder_hash: str | None = field(default=None, metadata={"help": "its fingerprint; filled in"})

    def __post_init__(self) -> None:
        optional = ("hidden_size", "state_size")
        check_counts(self, {"chunk_tokens": 1, "hidden_size": 1, "state_size": 1}, optional)
        check_ratio(self.ratio, "tokens per window")
        check_choices(self, {"encoder": ("reader", "embeddings", "minilm"), "weighting": ("uniform", "learned")})
        self.check_lora()
        self.check_query()
        self.check_reader_tuning()
        if self.query_aware and self.encoder != "reader":
            raise ValueError(f"encoder={self.encoder!r} cannot read a question: query_aware needs encoder='reader'.")


@register_compressor
class MeanPoolCompressor(WindowProjector, SoftCompressor):
    r"""Mean-pooled windows (as in arXiv 2510.20797 and LCLM, arXiv 2606.09659).

    A passage of L tokens is cut into ``n = ceil(L / ratio)`` windows: window k is the reader's tokens from
    ``floor(k * ratio)`` to ``floor((k + 1) * ratio)``, the last one shorter. Each becomes one slot; `WindowProjector` has
    the formula. At ratio 1 the slots start as the passage's own embeddings. The weights are 1 over the window's length, or
    learned: a softmax over the window of a score per vocabulary entry plus a linear score of the state, both zero at first.
    Nothing depends on the ratio, so one checkpoint serves every ratio: train it on random ones.

    The papers' encoders are bidirectional. A causal reader is not: with ``encoder="reader"`` a token's state depends only on
    what comes before it in its stretch of ``chunk_tokens`` tokens. ``"minilm"`` is bidirectional; its tokens are aligned with
    the reader's by characters. Windows cross the borders of stretches.

    Args:
        config: the settings.
        reader: the reader.
        embedder: for ``encoder="minilm"`` an embedder or a SentenceTransformer, instead of loading ``config.embedder``. It must
            be the one of training.

    Attributes:
        encoder: the reader's `LoRATwin` (``encoder="reader"`` only).
        token_score, state_score: ``[vocabulary]``, and a linear layer to one number (``weighting="learned"`` only).
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
        batch_positions: positions per forward pass of the encoder (memory vs. speed; the result does not change).

    Raises:
        ValueError: if the embedder is not the one of training, or the reader has too few positions.
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
        size = reader.width
        if config.encoder == "reader":
            self.encoder = LoRATwin(reader.model, **config.lora)
            with torch.no_grad():  # hidden states and embeddings may differ in width
                size = self.states_of(self._stretches([[0]], [[]]))[0].shape[1]
        elif config.encoder == "minilm":
            size = self._use_embedder(embedder)
        self.add_projector(reader, size, config.hidden_size)
        self.token_score = self.state_score = None
        if config.weighting == "learned":
            self.token_score = nn.Parameter(torch.zeros(reader.vocab_size))
            self.state_score = nn.Linear(size, 1, bias=False)
            nn.init.zeros_(self.state_score.weight)
        self.to(reader.device)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """The base reader and the embedder."""
        return [self.base_reader.fingerprint, self.config.embedder_hash]

    def _use_embedder(self, given: Any) -> int:
        """Loads the frozen encoder, or checks the given one, and returns the width of its states."""
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

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """One slot per window."""
        reader, dtype, ids = self.base_reader, self.linear.weight.dtype, passages.ids
        lengths = [window_lengths(len(passage), ratio or 1.0) for passage in ids]
        windows = [n for passage in lengths for n in passage]
        if not windows:
            return [torch.zeros(0, reader.width)] * len(ids)
        flat = torch.tensor([i for passage in ids for i in passage], device=reader.device)
        with torch.no_grad():
            embeds = reader.embed(flat).to(dtype)
        states = embeds if self.config.encoder == "embeddings" else self._states(passages).to(reader.device, dtype)
        n = len(windows)
        where = torch.repeat_interleave(torch.arange(n), torch.tensor(windows)).to(reader.device)
        slots = self.pool_windows(embeds, states, self._weights(flat, states, where, n), where, n)
        return slots.split([len(passage) for passage in lengths])

    def _weights(self, ids: Tensor, states: Tensor, where: Tensor, n: int) -> Tensor:
        """``[tokens]`` weights that add up to 1 in each of the ``n`` windows."""
        if self.token_score is None or self.state_score is None:
            return 1 / torch.bincount(where, minlength=n).to(states.dtype)[where]
        normed = nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)
        scores = self.token_score[ids] + self.state_score(normed)[:, 0]
        highest = scores.detach().new_full((n,), -math.inf).scatter_reduce(0, where, scores.detach(), "amax")
        powers = (scores - highest[where]).exp()
        return powers / powers.new_zeros(n).index_add(0, where, powers)[where]

    def _states(self, passages: Passages) -> Tensor:
        """``[tokens, state width]`` at every reader token of every passage."""
        if self.encoder is None:
            return torch.cat([self._aligned(text) for text, ids in zip(passages.texts, passages.ids) if ids])
        questions = question_ids(self.config, self.base_reader.prompts, passages.queries)
        return torch.cat(self.states_of(self._stretches(passages.ids, questions)))

    def _stretches(self, ids: Sequence[list[int]], questions: Sequence[list[int]]) -> list[Segment]:
        reader, found = self.base_reader, []
        for passage, question in zip(ids, questions):
            room = room_for_tokens(reader.max_positions, reader.name, len(reader.bos_ids), len(question))
            start = 0
            for n in equal_lengths(len(passage), min(self.config.chunk_tokens, room or self.config.chunk_tokens)):
                found.append(Segment(passage[start : start + n], 0, [*reader.bos_ids, *question]))
                start += n
        return found

    def states_of(self, stretches: Sequence[Segment]) -> list[Tensor]:
        """The tuned reader's last hidden states ``[tokens, hidden]`` per stretch."""
        reader, encoder = self.base_reader, self.encoder
        assert encoder is not None
        return token_states(encoder, stretches, reader.embed, reader.device, self.batch_positions)

    def _aligned(self, text: str) -> Tensor:
        """``[reader tokens, state width]``: mean of the embedder's states over each reader token's characters.

        A reader token without embedder tokens (white space, for example) gets zeros.
        """
        embedder: Any = self._embedder
        spans = embedder.shard(text, embedder.max_tokens)
        found: list[Tensor] = [torch.zeros(0, self.config.state_size or 0)]
        places: list[tuple[int, int]] = []
        for (start, _), (offsets, states) in zip(spans, embedder.token_states([text[a:b] for a, b in spans])):
            places += [(start + a, start + b) for a, b in offsets]
            found.append(states)
        return averaged(torch.cat(found), places, self.reader.tokenize_with_offsets(text)[1], len(text))[0]
