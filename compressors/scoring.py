"""Self-information of a text's tokens under a causal LM: the scores that text compressors select by.

Every token is forwarded once, whatever the length of the text, and no logits over the whole vocabulary are ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kv import position_arguments
from .reader import Reader

_OVERLAP = 32  # a window repeats 1/32 of itself as context for the next
_LOGITS = 1 << 24  # logits held at a time: 64 MB in float32


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a text's tokens tell.

    Attributes:
        ids: the scorer's tokens.
        offsets: ``(start, end)`` characters of each token; tokens that share a character share its offsets.
        nll: ``[tokens]`` float32 on the CPU, ``-log p(token | what came before)`` in nats.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    nll: Tensor


@dataclass(frozen=True)
class _Job:
    """One row to read: its last ``scored`` tokens are tokens ``end - scored`` to ``end`` of a text."""

    text: int
    end: int
    row: list[int]
    scored: int


@torch.no_grad()
def self_information(
    scorer: Reader,
    texts: Sequence[str],
    *,
    prefixes: Sequence[str] | None = None,
    window: int = 2048,
    batch_positions: int = 8192,
    padding: float | None = None,
) -> list[TokenScores]:
    """Scores every token of every text by its negative log-likelihood.

    A text is read once, behind the scorer's BOS (or, where its tokenizer puts none, its end-of-text token). One longer
    than the window is read in windows that repeat 1/32 of a window as context, so that at most 1.04 positions are
    forwarded for a token. Texts of like length share a batch.

    Args:
        scorer: the causal LM.
        texts: the texts; an empty one gets no scores.
        prefixes: for each text what is read before it in every window (a question, say) without being scored.
        window: longest stretch read at once; never above the scorer's positions.
        batch_positions: positions in one forward pass, padding counted.
        padding: share of a batch that may be padding; ``None``: 0.03 on a CPU, where padding costs time, else 0.5.

    Returns:
        One `TokenScores` a text, in order.

    Raises:
        ValueError: if the number of prefixes differs from that of the texts, or a prefix leaves no room for the text.
    """
    if prefixes is not None and len(prefixes) != len(texts):
        raise ValueError(f"One prefix a text is needed: got {len(prefixes)} prefixes for {len(texts)} texts.")
    encoded = [scorer.tokenize_with_offsets(text) for text in texts]
    heads = [[]] * len(texts) if prefixes is None else scorer.tokenize_batch(prefixes)
    opening = _opening(scorer)
    room = window if scorer.max_positions is None else min(window, scorer.max_positions)
    # Nothing foretells the first token where there is no prefix at all: it is taken to be as likely as any other.
    nll = [torch.full((len(ids),), math.log(scorer.vocab_size)) for ids, _ in encoded]
    jobs = [job for i, (ids, _) in enumerate(encoded) for job in _jobs(i, ids, [*opening, *heads[i]], room)]
    if padding is None:
        padding = padding_share(scorer.device)
    for batch in batches([len(job.row) - 1 for job in jobs], batch_positions, padding):
        found = _score(scorer, [jobs[i] for i in batch])
        for i, values in zip(batch, found):
            job = jobs[i]
            nll[job.text][job.end - job.scored : job.end] = values
    return [TokenScores(ids, offsets, values) for (ids, offsets), values in zip(encoded, nll)]


def _opening(scorer: Reader) -> list[int]:
    """What a text is read behind: BOS, or the token that parts texts where the tokenizer has no BOS."""
    if scorer.bos_ids:
        return list(scorer.bos_ids)
    bos = getattr(scorer.tokenizer, "bos_token_id", None)
    found = scorer.eos_id if bos is None else bos
    return [] if found is None else [found]


def _jobs(text: int, ids: list[int], head: list[int], room: int) -> Iterator[_Job]:
    # A row's last token is scored and not read, so a row may have one token more than there is room.
    span = room - len(head) + 1
    if ids and span < 1:
        raise ValueError(
            f"A prefix of {len(head)} tokens leaves no room for the text in a window of {room}; shorten the prefix."
        )
    start = 0
    while start < len(ids):
        context = max(start - span // _OVERLAP, 0)
        end = min(context + span, len(ids))
        row = head + ids[context:end]
        scored = min(end - start, len(row) - 1)
        if scored:
            yield _Job(text, end, row, scored)
        start = end


@torch.no_grad()
def next_token_losses(scorer: Reader, ids: Sequence[int]) -> Tensor:
    """``[len(ids) - 1]`` losses of a row read as it stands, without BOS: entry i is ``-log p(ids[i + 1] | ids[: i + 1])``.

    Float32 on the CPU; empty where the row has fewer than two tokens.
    """
    if len(ids) < 2:
        return torch.zeros(0)
    return _score(scorer, [_Job(0, len(ids), list(ids), len(ids) - 1)])[0]


def padding_share(device: torch.device) -> float:
    """The share of a batch that may be padding: little on a CPU, where padding costs time."""
    return 0.03 if device.type == "cpu" else 0.5


def batches(lengths: Sequence[int], positions: int, padding: float) -> Iterator[list[int]]:
    """Batches of like length, the longest first, within the positions and the share of padding that are allowed."""
    batch: list[int] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        area = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if batch and (area > positions or area - used - lengths[i] > padding * area):
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += lengths[i]
    if batch:
        yield batch


def _score(scorer: Reader, jobs: Sequence[_Job]) -> list[Tensor]:
    """For each row the negative log-likelihoods ``[scored]`` of its last tokens, float32 on the CPU."""
    longest = max(len(job.row) for job in jobs) - 1
    ids = torch.zeros(len(jobs), longest, dtype=torch.long)
    mask = torch.zeros(len(jobs), longest, dtype=torch.long)
    picked = torch.zeros(len(jobs), longest, dtype=torch.bool)
    for row, job in enumerate(jobs):
        n = len(job.row) - 1
        ids[row, :n] = torch.tensor(job.row[:-1])
        mask[row, :n] = 1
        picked[row, n - job.scored : n] = True
    decoder: nn.Module = scorer.model.get_decoder()  # type: ignore[assignment]
    # Right padding under a causal mask: row by row the positions are those of an unpadded pass.
    positions = torch.arange(longest, device=scorer.device).expand(ids.shape)
    hidden = decoder(
        input_ids=ids.to(scorer.device),
        attention_mask=mask.to(scorer.device),
        use_cache=False,
        **position_arguments(decoder, positions),
    ).last_hidden_state
    hidden = hidden[picked.to(hidden.device)]
    targets = torch.tensor([i for job in jobs for i in job.row[len(job.row) - job.scored :]], device=hidden.device)
    rows = max(1, _LOGITS // scorer.vocab_size)
    parts = []
    for states, wanted in zip(hidden.split(rows), targets.split(rows)):
        logits = scorer.head(states).float()
        parts.append(logits.logsumexp(dim=-1) - logits.gather(-1, wanted[:, None].to(logits.device))[:, 0])
    return list(torch.cat(parts).cpu().split([job.scored for job in jobs]))
