"""Self-information of a text's tokens under a causal LM: the scores that text compressors select by.

Every token is forwarded once, whatever the length of the text, and no logits over the whole vocabulary are ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.batching import batches, padding_share
from ..reader.kv import position_arguments
from ..reader.reader import Reader

BLANK_LINE = "\n\n"
_OVERLAP = 32  # a window repeats 1/32 of itself as context for the next
_LOGITS = 1 << 21  # logits held at a time: 8 MB in float32, which stay in a processor's cache


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a text's tokens tell.

    Attributes:
        ids: the scorer's tokens.
        offsets: ``(start, end)`` characters of each token; tokens that share a character share its offsets.
        nll: ``[tokens]`` float32 on the CPU, ``-log p(token | what came before)`` in nats.
        ending: the mean loss of what was read behind the text, where something was; of several windows the lowest.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    nll: Tensor
    ending: float | None = None


@dataclass(frozen=True)
class _Job:
    """One row to read: its last ``scored`` tokens are tokens ``end - scored`` to ``end`` of a text, ``behind`` more follow."""

    text: int
    end: int
    row: list[int]
    scored: int
    behind: int = 0


@torch.no_grad()
def self_information(
    scorer: Reader,
    texts: Sequence[str],
    *,
    prefixes: Sequence[str] | None = None,
    endings: Sequence[str] | None = None,
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
        endings: for each text what is read behind it in every window, parted from it by a blank line: under a causal model
            it changes nothing for the text, and its own loss tells what it has to do with the text.
        window: longest stretch read at once; never above the scorer's positions.
        batch_positions: positions in one forward pass, padding counted.
        padding: share of a batch that may be padding; ``None``: 0.03 on a CPU, where padding costs time, else 0.5.

    Returns:
        One `TokenScores` a text, in order.

    Raises:
        ValueError: if the number of prefixes or endings differs from that of the texts, or they leave no room for the text.
    """
    for name, given in (("prefix", prefixes), ("ending", endings)):
        if given is not None and len(given) != len(texts):
            plural = "prefixes" if name == "prefix" else "endings"
            raise ValueError(f"One {name} a text is needed: got {len(given)} {plural} for {len(texts)} texts.")
    encoded = [scorer.tokenize_with_offsets(text) for text in texts]
    heads = [[]] * len(texts) if prefixes is None else scorer.tokenize_batch(prefixes)
    asked = [[]] * len(texts) if endings is None else scorer.tokenize_batch(endings)
    border = scorer.tokenize(BLANK_LINE) if endings is not None else []
    opening = _opening(scorer)
    room = window if scorer.max_positions is None else min(window, scorer.max_positions)
    # Nothing foretells the first token where there is no prefix at all: it is taken to be as likely as any other.
    nll = [torch.full((len(ids),), math.log(scorer.vocab_size)) for ids, _ in encoded]
    jobs = [
        job
        for i, (ids, _) in enumerate(encoded)
        for job in _jobs(i, ids, [*opening, *heads[i]], [*border, *asked[i]], room)
    ]
    behind = [math.inf if part else None for part in asked]
    if padding is None:
        padding = padding_share(scorer.device)
    for batch in batches([len(job.row) - 1 for job in jobs], batch_positions, padding):
        found = _score(scorer, [jobs[i] for i in batch])
        for i, values in zip(batch, found):
            job = jobs[i]
            nll[job.text][job.end - job.scored : job.end] = values[: job.scored]
            if (known := behind[job.text]) is not None:
                behind[job.text] = min(known, float(values[-len(asked[job.text]) :].mean()))
    return [TokenScores(*tokens, values, ending) for tokens, values, ending in zip(encoded, nll, behind)]


def _opening(scorer: Reader) -> list[int]:
    """What a text is read behind: BOS, or the token that parts texts where the tokenizer has no BOS."""
    if scorer.bos_ids:
        return list(scorer.bos_ids)
    bos = getattr(scorer.tokenizer, "bos_token_id", None)
    found = scorer.eos_id if bos is None else bos
    return [] if found is None else [found]


def _jobs(text: int, ids: list[int], head: list[int], tail: list[int], room: int) -> Iterator[_Job]:
    # A row's last token is scored and not read, so a row may have one token more than there is room.
    span = room - len(head) - len(tail) + 1
    if ids and span < 1:
        what = f"A prefix of {len(head)} tokens" + (f" and an ending of {len(tail)}" if tail else "")
        raise ValueError(f"{what} leaves no room for the text in a window of {room}; shorten it.")
    start = 0
    while start < len(ids):
        context = max(start - span // _OVERLAP, 0)
        end = min(context + span, len(ids))
        row = [*head, *ids[context:end], *tail]
        scored = min(end - start, len(row) - len(tail) - 1)
        if scored or tail:
            yield _Job(text, end, row, scored, len(tail))
        start = end


@torch.no_grad()
def row_losses(scorer: Reader, rows: Sequence[Sequence[int]], batch_positions: int = 8192) -> list[Tensor]:
    """For each row of n ids ``[n - 1]`` losses as it stands, without BOS: entry i is ``-log p(ids[i + 1] | ids[: i + 1])``.

    Float32 on the CPU; empty where a row has fewer than two tokens. Rows of like length share a batch.
    """
    out = [torch.zeros(0)] * len(rows)
    read = [i for i, ids in enumerate(rows) if len(ids) > 1]
    for batch in batches([len(rows[i]) - 1 for i in read], batch_positions, padding_share(scorer.device)):
        jobs = [_Job(0, len(rows[read[i]]), list(rows[read[i]]), len(rows[read[i]]) - 1) for i in batch]
        for i, losses in zip(batch, _score(scorer, jobs)):
            out[read[i]] = losses
    return out


def next_token_losses(scorer: Reader, ids: Sequence[int]) -> Tensor:
    """`row_losses` of one row."""
    return row_losses(scorer, [ids])[0]


def _score(scorer: Reader, jobs: Sequence[_Job]) -> list[Tensor]:
    """For each row the negative log-likelihoods ``[scored + behind]`` of its last tokens, float32 on the CPU."""
    longest = max(len(job.row) for job in jobs) - 1
    ids = torch.zeros(len(jobs), longest, dtype=torch.long)
    mask = torch.zeros(len(jobs), longest, dtype=torch.long)
    picked = torch.zeros(len(jobs), longest, dtype=torch.bool)
    for row, job in enumerate(jobs):
        n = len(job.row) - 1
        ids[row, :n] = torch.tensor(job.row[:-1])
        mask[row, :n] = 1
        picked[row, n - job.scored - job.behind : n] = True
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
    counts = [job.scored + job.behind for job in jobs]
    targets = torch.tensor(
        [i for job, n in zip(jobs, counts) for i in job.row[len(job.row) - n :]], device=hidden.device
    )
    return list(token_losses(scorer, hidden, targets).cpu().split(counts))


@torch.no_grad()
def token_losses(scorer: Reader, hidden: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` in nats, with logits over the vocabulary for a few rows at a time.

    Args:
        scorer: the causal LM.
        hidden: ``[rows, width]`` last hidden states.
        targets: ``[rows]`` ids on the same device.

    Returns:
        ``[rows]`` float32.
    """
    out = torch.empty(len(targets), device=hidden.device)
    rows = max(1, _LOGITS // scorer.vocab_size)
    for first in range(0, len(targets), rows):
        logits = scorer.head(hidden[first : first + rows]).float()
        wanted = targets[first : first + rows].to(logits.device)
        out[first : first + rows] = nn.functional.cross_entropy(logits, wanted, reduction="none").to(out.device)
    return out
