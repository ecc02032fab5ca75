"""Mean-pooled windows: states of a few neighbouring tokens, averaged and projected, are one slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, added, check_choices, check_counts, check_ratio, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, ReaderTuningSettings, lora_rank, tuned_reader
from ..encoders.lora_twin import LoRATwin, share
from ..encoders.pooled_queries import cut_layers
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.pooling import passage_states, softmax_in_windows
from ..slots.projector import WindowProjector
from ..slots.question import QuerySettings, question_ids
from ..slots.segments import window_lengths


@dataclass
class MeanPoolConfig(LoRASettings, QuerySettings, ReaderTuningSettings, CompressorConfig):
    """Settings of mean-pooled windows."""

    method: ClassVar[str] = "mean-pool"
    title: ClassVar[str] = "mean-pooled windows"
    cost: ClassVar[str] = "states"
    retired: ClassVar[Mapping[str, Any]] = dict(
        bos=True, embedder="all-MiniLM-L6-v2", state_size=None, embedder_hash=None
    )
    retired_unhashed: ClassVar[Mapping[str, Any]] = {"segment_overlap": 0}

    encoder: Literal["reader", "embeddings"] = setting(
        "reader", "token states to pool: of the reader plus LoRA, or the reader's token embeddings"
    )
    ratio: float = setting(4.0, "tokens per window, if no ratio is asked for")
    weighting: Literal["uniform", "learned"] = setting(
        "uniform",
        "weights inside a window: equal, or a softmax over a learned score per vocabulary entry plus a linear score "
        "of the state, which starts equal",
    )
    hidden_size: int | None = setting(None, "width of the MLP's hidden layer; default: twice the reader's width")
    chunk_tokens: int = setting(1024, "longest stretch that encoder 'reader' reads at once")
    dropped_layers: int = added(0, "last layers (and final norm) of encoder 'reader' that are left out")
    r: int = lora_rank(32, " (encoder 'reader')")

    def __post_init__(self) -> None:
        check_counts(self, {"chunk_tokens": 1, "hidden_size": 1, "dropped_layers": 0}, optional=("hidden_size",))
        check_ratio(self.ratio, "tokens per window")
        check_choices(self, {"encoder": ("reader", "embeddings"), "weighting": ("uniform", "learned")})
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
    what comes before it in its stretch of ``chunk_tokens`` tokens. Windows cross the borders of stretches.

    Attributes:
        encoder: the reader's `LoRATwin` (``encoder="reader"`` only).
        token_score, state_score: ``[vocabulary]``, and a linear layer to one number (``weighting="learned"`` only).
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only).
        batch_positions: positions per forward pass of the encoder (memory vs. speed; the result does not change).

    Raises:
        ValueError: if the reader has too few positions.
    """

    config_class = MeanPoolConfig
    interface: ClassVar[Interface] = "embeds"
    config: MeanPoolConfig

    def __init__(self, config: MeanPoolConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self.encoder: LoRATwin | None = None
        size = reader.width
        if config.encoder == "reader":
            model = reader.model
            if config.dropped_layers:
                model = share(model)
                cut_layers(model.get_decoder(), config.dropped_layers)
            self.encoder = LoRATwin(model, **config.lora)
            with torch.no_grad():  # hidden states and embeddings may differ in width
                size = self.states(self.encoder, [[0]], [[]]).shape[1]
        self.add_projector(reader, size, config.hidden_size)
        self.token_score = self.state_score = None
        if config.weighting == "learned":
            self.token_score = nn.Parameter(torch.zeros(reader.vocab_size))
            self.state_score = nn.Linear(size, 1, bias=False)
            nn.init.zeros_(self.state_score.weight)
        self.to(reader.device)
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """The base reader, and no embedder."""
        return [self.base_reader.fingerprint, None]

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
        states = embeds
        if self.encoder is not None:
            questions = question_ids(self.config, reader.prompts, passages.queries)
            states = self.states(self.encoder, ids, questions).to(dtype)
        n = len(windows)
        where = torch.repeat_interleave(torch.arange(n), torch.tensor(windows)).to(reader.device)
        slots = self.pool_windows(embeds, states, self._weights(flat, states, where, n), where, n)
        return slots.split([len(passage) for passage in lengths])

    def _weights(self, ids: Tensor, states: Tensor, where: Tensor, n: int) -> Tensor:
        """``[tokens]`` weights that add up to 1 in each of the ``n`` windows."""
        if self.token_score is None or self.state_score is None:
            return 1 / torch.bincount(where, minlength=n).to(states.dtype)[where]
        normed = nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)
        return softmax_in_windows(self.token_score[ids] + self.state_score(normed)[:, 0], where, n)

    def states(self, encoder: LoRATwin, ids: Sequence[list[int]], questions: Sequence[list[int]]) -> Tensor:
        """``[all tokens, hidden]``: the tuned reader's last hidden states, read in stretches, each after its question."""
        return passage_states(self.base_reader, encoder, ids, questions, self.config.chunk_tokens, self.batch_positions)
