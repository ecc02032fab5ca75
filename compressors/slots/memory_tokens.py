"""Memory tokens: learned embeddings read after a segment, whose states become its slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.batching import SoftSequence, soft_batches
from ..encoders.lora_twin import Twin
from ..reader.reader import Reader
from .segments import Segment, spread

PROBE_TOKENS = 32


@torch.no_grad()
def random_token_rows(reader: Reader, n: int) -> Tensor:
    """``[n, width]`` float32: embeddings of random tokens, scaled to the mean norm of the reader's embeddings."""
    rows = torch.randperm(reader.vocab_size)[:n]
    start = reader.embed(rows[torch.arange(n) % len(rows)].to(reader.device)).float()
    return start * (reader.embedding_norm / start.norm(dim=-1, keepdim=True).clamp(min=1e-6))


def memory_rows(memory: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """``[slots, width]`` memory embeddings per segment: the first ones. A single row serves every slot."""
    which = torch.tensor([k % len(memory) for s in segments for k in range(s.slots)], dtype=torch.long)
    return list(memory[which].split([s.slots for s in segments]))


def memory_sequences(segments: Sequence[Segment], rows: Sequence[Tensor], positions: str) -> list[SoftSequence]:
    """``[front][segment][memory tokens]`` per segment.

    Args:
        segments: the segments.
        rows: ``[slots, width]`` embeddings of each segment's memory tokens.
        positions: position ids of the memory tokens: ``"append"`` counts on after the segment, ``"spread"`` puts each at the
            middle of the tokens that it stands for.
    """
    sequences = []
    for segment, row in zip(segments, rows):
        first, length = len(segment.front), len(segment.ids)
        at = (
            first + spread(length, segment.slots)
            if positions == "spread"
            else first + length + torch.arange(segment.slots)
        )
        sequences.append(SoftSequence.with_memory([*segment.front, *segment.ids], row, at))
    return sequences


def states_at_memory(
    encoder: Twin,
    segments: Sequence[Segment],
    rows: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    positions: str = "append",
    budget: int = 16384,
) -> list[Tensor]:
    """Last hidden states ``[slots, hidden]`` at each segment's memory tokens, in batches of similar length.

    Args:
        encoder: the model that reads.
        segments, rows, positions: as in `memory_sequences`.
        embed: token ids to embeddings.
        device: where ``embed`` takes its ids.
        budget: positions per forward pass.
    """
    out: dict[int, Tensor] = {}
    sequences = memory_sequences(segments, rows, positions)
    for batch in soft_batches(sequences, embed, device, budget=budget):
        hidden = encoder(batch.embeds, batch.mask, batch.positions)
        out.update((i, states[len(states) - segments[i].slots :]) for i, states in batch.unpadded(hidden))
    return [out[i] for i in range(len(segments))]


def probe(vocabulary: int, longest: int | None, slots: int, front: list[int]) -> Segment:
    """A segment of random tokens, to measure the norm of an encoder's states with."""
    n = min(PROBE_TOKENS, longest or PROBE_TOKENS)
    ids = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return Segment(ids, slots, front)
