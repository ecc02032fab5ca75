"""Pools token embeddings into slots, and carries token states over to another tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, run_sequences
from ..core.hidden import hide
from ..encoders.lora_twin import Twin
from ..reader.reader import Reader
from .segments import Segment, equal_lengths, room_for_tokens, slot_of_token

_LIMIT = 8.0  # bound of a gate's logarithm: silences a token without overflow


class GatedPool(nn.Module):
    r"""Pools each slot's run of tokens t: :math:`s \sum_t w_t E_t / \sqrt{\sum_t w_t^2}` with :math:`w_t = e^{g \cdot E_t}`.

    E are the reader's embeddings (at root mean square 1 inside the gate); s and g are learned. Starts at g = 0, the plain sum
    over the square root of the length, and learns which tokens matter: the rare ones, as in a search index.

    Attributes:
        scale: s.
        gate: g, ``[1, width]``.
    """

    _reader: Reader

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        hide(self, "_reader", reader)
        self.scale = nn.Parameter(torch.ones((), device=reader.device))
        self.gate = nn.Parameter(torch.zeros(1, reader.width, device=reader.device))

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """``[all slots, width]`` in at least float32."""
        reader = self._reader
        where, count = _runs(segments, reader.device)
        with torch.no_grad():
            tokens = reader.embed(torch.tensor([i for s in segments for i in s.ids]).to(reader.device))
            tokens = tokens.to(torch.promote_types(self.gate.dtype, torch.float32))
            unit = tokens * (tokens.shape[1] ** 0.5 / reader.embedding_norm)
        strength = (unit * self.gate).sum(-1)  # not a matrix product, which autocast would run in bfloat16
        weight = torch.exp(_LIMIT * torch.tanh(strength / _LIMIT))
        total = tokens.new_zeros(count, tokens.shape[1]).index_add(0, where, tokens * weight[:, None])
        size = tokens.new_zeros(count).index_add(0, where, weight.square()).sqrt()
        return self.scale * total / size[:, None]


def summed_runs(embed: nn.Module, segments: Sequence[Segment]) -> Tensor:
    """``[all slots, width]`` float32: each slot's run of token embeddings, summed over the square root of its length."""
    ids = torch.tensor([i for s in segments for i in s.ids], dtype=torch.long)
    device = next(embed.parameters()).device
    where, count = _runs(segments, device)
    tokens = embed(ids.to(device)).float()
    total = tokens.new_zeros(count, tokens.shape[1]).index_add(0, where, tokens)
    return total / torch.bincount(where, minlength=count).clamp(min=1).sqrt()[:, None]


def _runs(segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, int]:
    """Index of each token's slot, and the number of slots."""
    slots = [s.slots for s in segments]
    return slot_of_token([len(s.ids) for s in segments], slots).to(device), sum(slots)


def token_states(
    encoder: Twin, segments: Sequence[Segment], embed: Callable[[Tensor], Tensor], device: torch.device, budget: int
) -> list[Tensor]:
    """Last hidden states ``[tokens, hidden]`` at each segment's own tokens, in batches of similar length.

    Args:
        encoder: the model that reads ``[front][segment]``.
        segments: the segments.
        embed: token ids to embeddings.
        device: where ``embed`` takes its ids.
        budget: positions per forward pass.
    """
    nothing = torch.zeros(0, embed(torch.zeros(1, dtype=torch.long, device=device)).shape[-1])
    sequences = [SoftSequence([*s.front, *s.ids], [], nothing) for s in segments]
    states = run_sequences(encoder, sequences, embed, device, budget)
    return [found[len(segment.front) :] for found, segment in zip(states, segments)]


def passage_states(
    reader: Reader,
    encoder: Twin,
    ids: Sequence[list[int]],
    questions: Sequence[list[int]],
    chunk_tokens: int,
    budget: int,
) -> Tensor:
    """``[all tokens, hidden]``: last hidden states at the passages' tokens, read in stretches, each after BOS and question.

    Args:
        reader: source of embeddings and positions.
        encoder: a tuned copy of the reader, or of some of its layers.
        ids: token ids of each passage.
        questions: token ids of each passage's question.
        chunk_tokens: longest stretch.
        budget: positions per forward pass.

    Raises:
        ValueError: if a question leaves no room for a token.
    """
    stretches = []
    for passage, question in zip(ids, questions):
        room = room_for_tokens(reader.max_positions, reader.name, len(reader.bos_ids), len(question))
        start = 0
        for n in equal_lengths(len(passage), min(chunk_tokens, room or chunk_tokens)):
            stretches.append(Segment(passage[start : start + n], 0, [*reader.bos_ids, *question]))
            start += n
    return torch.cat(token_states(encoder, stretches, reader.embed, reader.device, budget))


def softmax_in_windows(scores: Tensor, where: Tensor, n: int) -> Tensor:
    """Softmax over the tokens of each of ``n`` windows.

    Args:
        scores: ``[tokens, ...]``.
        where: ``[tokens]`` index of each token's window.
        n: number of windows.
    """
    index = where.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.detach().new_full((n, *scores.shape[1:]), float("-inf"))
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    powers = (scores - highest[where]).exp()
    return powers / powers.new_zeros(highest.shape).index_add(0, where, powers)[where]


def averaged(
    values: Tensor, spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], characters: int
) -> tuple[Tensor, Tensor]:
    """Carries values of one tokenizer's tokens over to another's, by the characters they share.

    Args:
        values: ``[tokens, size]``.
        spans: ``(start, end)`` characters of each of these tokens.
        wanted: characters of the other tokenizer's tokens.
        characters: length of the text.

    Returns:
        ``[wanted, size]`` means over each wanted token's characters, and ``[wanted]`` whether there was anything to average;
        zeros if not (BERT has no token for white space, for example).
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
    """The integers of all ranges ``[start, start + length)``, concatenated."""
    if not len(lengths):
        return starts
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=starts.device) + torch.repeat_interleave(starts - first, lengths)
