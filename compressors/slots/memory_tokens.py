"""Memory tokens: learned embeddings read after a segment, whose states become its slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.batching import SoftSequence, run_sequences
from ..encoders.lora_twin import Twin
from ..reader.reader import Reader
from .segments import Segment, SegmentCompressor, slot_of_token, spread

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


def interleaved(segments: Sequence[Segment], row: Tensor, owners: Sequence[Tensor] | None = None) -> list[SoftSequence]:
    """``[front][run][memory token][run][memory token]...`` per segment: one memory token after each slot's run of tokens.

    Args:
        segments: the segments.
        row: ``[1, width]`` embedding of every memory token.
        owners: ``[tokens]`` the slot of each token, per segment; default: even runs.
    """
    sequences = []
    for number, segment in enumerate(segments):
        first, length, slots = len(segment.front), len(segment.ids), segment.slots
        # the slot of each token is also the number of memory tokens before it
        slot = slot_of_token([length], [slots]) if owners is None else owners[number]
        ids = torch.zeros(length + slots, dtype=torch.long)
        ids[torch.arange(length) + slot] = torch.tensor(segment.ids)
        places = torch.bincount(slot, minlength=slots).cumsum(0) + torch.arange(slots) + first
        sequences.append(SoftSequence([*segment.front, *ids.tolist()], places.tolist(), row.expand(slots, -1)))
    return sequences


class MemoryTokenCompressor(SegmentCompressor):
    """Base class of methods whose slots come from the last hidden states at appended memory tokens.

    Attributes:
        encoder: the model that reads ``[front][segment][memory tokens]``.
        memory: ``[most slots or 1, encoder width]`` memory embeddings, usually a parameter.
    """

    encoder: Twin
    memory: Tensor

    def states_at_memory(self, segments: Sequence[Segment], positions: str = "append") -> Tensor:
        """Last hidden states ``[all slots, hidden]`` at the memory tokens; ``positions`` as in `memory_sequences`."""
        sequences = memory_sequences(segments, memory_rows(self.memory, segments), positions)
        device, budget = self.base_reader.device, self.batch_positions
        states = run_sequences(self.encoder, sequences, self.source.embed, device, budget)
        return torch.cat([found[len(found) - segment.slots :] for found, segment in zip(states, segments)])


def probe(vocabulary: int, longest: int | None, slots: int, front: list[int]) -> Segment:
    """A segment of random tokens, to measure the norm of an encoder's states with."""
    n = min(PROBE_TOKENS, longest or PROBE_TOKENS)
    ids = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return Segment(ids, slots, front)
