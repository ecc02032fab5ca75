"""IC-Former: learned digests cross-attend to a passage's token embeddings and become its slots; no language model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import random_token_rows
from ..slots.projector import learned_scale, scaled
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings


@dataclass
class ICFormerConfig(SegmentSettings, CompressorConfig):
    """Settings of IC-Former."""

    method: ClassVar[str] = "icformer"
    title: ClassVar[str] = "IC-Former"
    cost: ClassVar[str] = "blocks"

    segment_tokens: int | None = setting(512, "longest segment (the paper's chunk)", kw_only=True)
    digests: int = setting(128, "digest embeddings: the most slots of a segment")
    layers: int = setting(3, "cross-attention blocks")
    heads: int | None = setting(None, "attention heads of a block; default: as many as the reader has")

    def __post_init__(self) -> None:
        check_counts(self, {"digests": 1, "layers": 1, "heads": 1}, optional=("heads",))
        self.check_segments()


class DigestBlock(nn.Module):
    """Cross-attention from digests to context, then a SwiGLU MLP; both after an RMSNorm and added to their input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.context_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 8 * width // 3, bias=False) for _ in range(2))  # as wide as in LLaMA
        self.down = nn.Linear(8 * width // 3, width, bias=False)

    def forward(self, digests: Tensor, context: Tensor, mask: Tensor, angles: Tensor) -> Tensor:
        """Digests ``[batch, slots, width]`` after this block; the last keys of ``[batch, keys, width]`` context are their own.

        ``mask`` is ``[batch, 1, slots, keys]``, ``angles`` (rotary, of the keys) ``[batch, 1, keys, head size / 2]``.
        """
        context = self.context_norm(context)
        made = self.query(self.norm(digests)), self.key(context), self.value(context)
        query, key, value = (states.unflatten(-1, (self.heads, -1)).transpose(1, 2) for states in made)
        query, key = rotated(query, angles[:, :, -digests.shape[1] :]), rotated(key, angles)
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        digests = digests + self.out(found.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(digests)
        return digests + self.down(silu(self.gate(normed)) * self.up(normed))


def rotated(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: turns the pair of entries i and i + size / 2 of each head's state by the i-th angle."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos().type_as(states), angles.sin().type_as(states)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@register_compressor
class ICFormerCompressor(SegmentCompressor):
    """In-Context Former (IC-Former, arXiv 2406.13618).

    A few blocks of cross-attention refine learned digests. Queries come from the digests, keys and values from the reader's
    token embeddings of ``[BOS][segment]`` and the initial digests, the same in every block. A digest sees all tokens, the
    digests before it and itself. Keys are at positions 0, 1, 2, ..., queries where their digests are. The last block's digests
    after an RMSNorm are the slots. No language model runs: cost is linear in the passage's length, and tokens have no context.

    Beyond the paper: slots are proportional to the segment (the first digests are used), so that a short passage never grows
    and one checkpoint serves every ratio (train it on random ratios). BOS opens every segment. Digests start as embeddings of
    random tokens (zeros in the release, told apart by position alone), slots on the scale of the reader's embeddings.
    Prompts in words replace the learned vectors [AE] and [FT] that tell the reader what to do.

    Attributes:
        digests: ``[digests, width]`` initial digests.
        blocks, norm: the `DigestBlock` modules, and the RMSNorm after them.
        log_scale: logarithm of the output factor.

    Raises:
        ValueError: if the reader's width cannot be split into that many heads of an even size.
    """

    config_class = ICFormerConfig
    interface: ClassVar[Interface] = "embeds"
    config: ICFormerConfig

    def __init__(self, config: ICFormerConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        width = reader.width
        heads = config.heads or reader.model.config.get_text_config().num_attention_heads
        if width % (2 * heads):
            raise ValueError(
                f"heads must divide half the width of the reader's embeddings, so that rotary positions turn pairs; got "
                f"{heads} for {reader.name!r}, which is {width} wide: set heads to another number."
            )
        self.digests = nn.Parameter(random_token_rows(reader, config.digests))
        self.blocks = nn.ModuleList(DigestBlock(width, heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.log_scale = learned_scale(reader.embedding_norm / width**0.5, reader)
        self.head_size = width // heads
        self.to(reader.device)

    @property
    def most_slots(self) -> int:
        """Digests."""
        return self.config.digests

    @property
    def max_positions(self) -> None:
        """No limit: the reader does not run, and rotary positions have no table."""

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """``[slots, width]`` per segment, in batches of similar length."""
        made, device = dict[int, Tensor](), self.base_reader.device
        read = [[*s.front, *s.ids] for s in segments]
        for which in pack(list(map(len, read)), self.batch_positions, pass_positions(device)):
            ids, real = pad_rows([read[i] for i in which])
            rows = self.digest(ids.to(device), real.to(device), max(segments[i].slots for i in which))
            made |= {i: row[: segments[i].slots] for i, row in zip(which, rows)}
        return [made[i] for i in range(len(segments))]

    def digest(self, ids: Tensor, real: Tensor, slots: int) -> Tensor:
        """``[batch, slots, width]`` digests of ``[batch, time]`` token ids; ``real`` is 0 at padding, on the right."""
        (batch, time), device, digests = ids.shape, ids.device, self.digests[:slots].expand(len(ids), -1, -1)
        with torch.no_grad():
            tokens = self.base_reader.embed(ids).to(digests.dtype)
        context = torch.cat([tokens, digests], dim=1)
        earlier = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
        sees = torch.cat([real.bool()[:, None].expand(-1, slots, -1), earlier.expand(batch, -1, -1)], dim=-1)
        own = real.sum(1, keepdim=True) + torch.arange(slots, device=device)
        positions = torch.cat([torch.arange(time, device=device).expand(batch, -1), own], dim=1)
        rates = 10000.0 ** (-torch.arange(0, self.head_size, 2, device=device) / self.head_size)
        for block in self.blocks:
            digests = block(digests, context, sees[:, None], positions[:, None, :, None] * rates)
        return scaled(self.norm(digests), self.log_scale)
