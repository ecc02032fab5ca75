"""Token elimination: keeps the words that the reader attends to when it starts to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import CompressorConfig, check_counts
from ..core.units import Span
from ..fidelity.questions import ASKED
from ..reader.attention import attending, check_reachable
from ..reader.kv import position_arguments
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import check_no_published
from .scoring import TokenScores
from .selection import LMSelectingCompressor, LMSelectionConfig

_POSITIONS = 8192  # per forward pass


@dataclass
class TokenEliminationConfig(LMSelectionConfig):
    """Settings of token elimination."""

    method: ClassVar[str] = "token-elimination"
    title: ClassVar[str] = "Token elimination"

    unit: str = field(default="sentence", metadata={"help": "kept or dropped as a whole"})
    rows: int = field(default=8, metadata={"help": "last tokens of the question's prompt whose attention counts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"rows": 1})
        check_no_published(self, "the paper drops positions of an encoder-decoder's memory, and no text")


@register_compressor
class TokenEliminationCompressor(LMSelectingCompressor):
    """Keeps the words with the most attention (token elimination, arXiv 2310.13682, for decoder-only readers).

    The reader reads passage, question and "Answer:". The score of a token is the attention that the last ``rows`` positions
    give it, times the norm of its value vector: the mean over heads and rows, the sum over the middle third of the layers. The
    last position is the one that predicts the first token of the answer.

    The paper does so with the cross-attention of an encoder-decoder after the first answer tokens. No training.

    Raises:
        ValueError: if the reader's attention cannot be reached.
    """

    config_class: ClassVar[type[CompressorConfig]] = TokenEliminationConfig
    config: TokenEliminationConfig
    query_aware: bool = True

    def __init__(self, config: TokenEliminationConfig, reader: Reader, *, scorer: Reader | None = None) -> None:
        super().__init__(config, reader, scorer=scorer)
        try:
            check_reachable(self.scorer.model)
        except ValueError as error:
            raise ValueError(
                f"Token elimination reads the attention of {self.scorer.name!r}, which must go through "
                'transformers.AttentionInterface, as sdpa or eager (from_pretrained(..., attn_implementation="sdpa")); '
                "choose another scorer otherwise."
            ) from error

    @torch.no_grad()
    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The attention that each token gets.

        Raises:
            ValueError: if a question is missing, or leaves no room for the text.
        """
        asked = list(queries or [None] * len(texts))
        if any(query is None or not query.strip() for query in asked):
            raise ValueError("Token elimination keeps words for a question and got none; pass query=....")
        pieces = [self.scorer.tokenize_with_offsets(text) for text in texts]
        endings = self.scorer.tokenize_batch([ASKED.format(question=query) for query in asked])
        jobs: list[tuple[int, int, int]] = []
        for i, ((ids, _), ending) in enumerate(zip(pieces, endings)):
            room = self._room - len(ending)
            if room < 1:
                raise ValueError(f"The question's {len(ending)} tokens leave no room for the text; shorten it.")
            # Windows of one size: the attention of a window is shared by all of its tokens.
            count = -(-len(ids) // room)
            borders = [k * len(ids) // count for k in range(count + 1)] if count else []
            jobs += [(i, a, b) for a, b in pairwise(borders)]
        values = [torch.zeros(len(ids)) for ids, _ in pieces]
        bos = list(self.scorer.bos_ids)
        rows = [[*bos, *pieces[i][0][a:b], *endings[i]] for i, a, b in jobs]
        for (i, a, b), found in zip(jobs, self._attention(rows, [len(endings[i]) for i, _, _ in jobs])):
            values[i][a:b] = found[len(bos) : len(bos) + b - a]
        return [TokenScores(ids, offsets, nll) for (ids, offsets), nll in zip(pieces, values)]

    @property
    def _room(self) -> int:
        limit = self.scorer.max_positions
        return (self.config.window if limit is None else min(self.config.window, limit)) - len(self.scorer.bos_ids)

    def _attention(self, rows: Sequence[list[int]], endings: Sequence[int]) -> list[Tensor]:
        """``[time]`` attention to each position of each row."""
        decoder: Any = self.scorer.model.get_decoder()
        layers = self.scorer.model.config.get_text_config().num_hidden_layers
        middle = range(layers // 3, max(layers // 3 + 1, -(-2 * layers // 3)))
        device, out = self.scorer.device, [torch.zeros(0)] * len(rows)
        for batch in pack([len(row) for row in rows], _POSITIONS, pass_positions(self.scorer.device, False)):
            ids, mask = pad_rows([rows[i] for i in batch])
            door = _Attention(mask.sum(1).to(device), [min(self.config.rows, endings[i]) for i in batch], middle)
            positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
            with attending(self.scorer.model, door):
                decoder(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    use_cache=False,
                    **position_arguments(decoder, positions),
                )
            for i, found in zip(batch, door.total.cpu()):
                out[i] = found[: len(rows[i])]
        return out

    def as_published(
        self, text: str, query: str | None, ratio: float, target_tokens: int | None
    ) -> tuple[str, tuple[Span, ...]]:
        """Not available; the config refuses the mode."""
        raise ValueError("mode='published' is not available.")


class _Attention:
    """Sums the attention of the last rows of a right-padded batch over some layers (a `Door`).

    Args:
        lengths: ``[batch]`` tokens of each row.
        counts: how many last tokens of each row attend.
        layers: the layers that count.

    Attributes:
        total: ``[batch, time]`` attention times value norm.
    """

    def __init__(self, lengths: Tensor, counts: Sequence[int], layers: range) -> None:
        wanted = torch.tensor(counts, device=lengths.device)
        self.layers, self.total = layers, torch.zeros(0)
        # The last positions of each row, the last one first; a row with fewer of them repeats none.
        self.at = lengths[:, None] - 1 - torch.arange(int(wanted.max()), device=lengths.device)
        self.real = torch.arange(int(wanted.max()), device=lengths.device) < wanted[:, None]
        self.at = self.at.clamp(min=0)

    def enter(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds a layer; changes nothing."""
        if layer in self.layers:
            batch, heads, time, width = query.shape
            index = self.at[:, None, :, None].expand(batch, heads, -1, width)
            asked, keys = query.gather(2, index).float(), key.float()
            share = heads // key.shape[1]
            keys, norms = keys.repeat_interleave(share, 1), value.float().norm(dim=-1).repeat_interleave(share, 1)
            scores = asked @ keys.transpose(-1, -2) * (options.get("scaling") or width**-0.5)
            if cap := options.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            seen = torch.arange(time, device=query.device) <= self.at[:, :, None]
            if mask is not None:  # padding, and a layer's sliding window
                allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                allowed = allowed[:, 0, :, :time].expand(batch, -1, -1)
                seen = seen & allowed.gather(1, self.at[:, :, None].expand(-1, -1, time))
            weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) * norms[:, :, None]
            rows = weights.mean(1) * self.real[:, :, None]
            added = rows.sum(1) / self.real.sum(1, keepdim=True)
            self.total = added if not len(self.total) else self.total + added
        return key, value, mask
