"""Token scores of text methods: self-information under a causal LM.

Each token is forwarded once, however long the text. Logits over the vocabulary exist for a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.batching import pack, pad_rows, pass_positions
from ..core.textfiles import check_strings
from ..reader.kv import position_arguments
from ..reader.reader import Reader

BLANK_LINE = "\n\n"
_OVERLAP = 32  # each window repeats 1/32 of its length as context
_LOGITS = 1 << 21  # logits held at a time: 8 MB in float32, which fit into a CPU cache


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of a text's tokens.

    Attributes:
        ids: the scorer's tokens.
        offsets: ``(start, end)`` characters of each token; tokens of one character share its offsets.
        nll: ``[tokens]`` float32 on the CPU: ``-log p(token | before)`` in nats, or another score; higher stays.
        ending: mean loss of the text read after it, if any; the lowest over several windows.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    nll: Tensor
    ending: float | None = None


@dataclass(frozen=True)
class _Job:
    """One row: the last ``scored`` tokens before ``tail`` trailing ones are tokens ``end - scored`` to ``end`` of a text."""

    text: int
    end: int
    row: list[int]
    scored: int
    tail: int = 0


@torch.no_grad()
def self_information(
    scorer: Reader,
    texts: Sequence[str],
    *,
    prefixes: Sequence[str] | None = None,
    endings: Sequence[str] | None = None,
    window: int = 2048,
    batch_positions: int = 8192,
) -> list[TokenScores]:
    """Scores each token by its negative log-likelihood.

    A text is read after the scorer's BOS (or end-of-text token without BOS). A text longer than the window is read in
    windows that repeat 1/32 of a window as context: at most 1.04 forwarded positions per token.

    Args:
        scorer: the causal LM.
        texts: the texts; an empty one gets no scores.
        prefixes: one per text, read before it in every window (a question, say) and not scored.
        endings: one per text, read after it and a blank line in every window. It does not change the text's scores; its
            own mean loss is returned.
        window: longest stretch read at once, never above the scorer's positions.
        batch_positions: positions per forward pass, padding included.

    Raises:
        ValueError: if there is not one prefix or ending per text, or they leave no room for the text.
    """
    texts = check_strings("texts", texts)
    for name, given in (("prefixes", prefixes), ("endings", endings)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{name} must hold one entry per text: got {len(given)} {name} for {len(texts)} texts.")
    encoded = [scorer.tokenize_with_offsets(text) for text in texts]
    heads = [[]] * len(texts) if prefixes is None else scorer.tokenize_batch(prefixes)
    asked = [[]] * len(texts) if endings is None else scorer.tokenize_batch(endings)
    border = scorer.tokenize(BLANK_LINE) if endings is not None else []
    opening = _opening(scorer)
    room = window if scorer.max_positions is None else min(window, scorer.max_positions)
    # Without any prefix the first token has no prediction; it is scored as uniform.
    nll = [torch.full((len(ids),), math.log(scorer.vocab_size)) for ids, _ in encoded]
    jobs = [
        job
        for i, (ids, _) in enumerate(encoded)
        for job in _jobs(i, ids, [*opening, *heads[i]], [*border, *asked[i]], room)
    ]
    endings_found = [math.inf if part else None for part in asked]
    for job, values in zip(jobs, _score(scorer, jobs, batch_positions)):
        nll[job.text][job.end - job.scored : job.end] = values[: job.scored]
        if (known := endings_found[job.text]) is not None:
            endings_found[job.text] = min(known, float(values[-len(asked[job.text]) :].mean()))
    return [TokenScores(*tokens, values, ending) for tokens, values, ending in zip(encoded, nll, endings_found)]


def _opening(scorer: Reader) -> list[int]:
    """BOS, or the token that separates texts if the tokenizer adds no BOS."""
    if scorer.bos_ids:
        return list(scorer.bos_ids)
    bos = getattr(scorer.tokenizer, "bos_token_id", None)
    found = scorer.eos_id if bos is None else bos
    return [] if found is None else [found]


def _jobs(text: int, ids: list[int], head: list[int], tail: list[int], room: int) -> Iterator[_Job]:
    # The last token of a row is scored but not read, so a row may have one token more than `room`.
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


def row_losses(scorer: Reader, rows: Sequence[Sequence[int]], batch_positions: int = 8192) -> list[Tensor]:
    """Losses ``[n - 1]`` of each row of n ids, without BOS: entry i is ``-log p(ids[i + 1] | ids[: i + 1])``.

    Float32 on the CPU; empty for a row of fewer than two tokens.
    """
    out = [torch.zeros(0)] * len(rows)
    jobs = [_Job(i, len(ids), list(ids), len(ids) - 1) for i, ids in enumerate(rows) if len(ids) > 1]
    for job, losses in zip(jobs, _score(scorer, jobs, batch_positions)):
        out[job.text] = losses
    return out


@torch.no_grad()
def _score(scorer: Reader, jobs: Sequence[_Job], batch_positions: int) -> list[Tensor]:
    """Losses ``[scored + tail]`` of the last tokens of each row, float32 on the CPU; similar lengths share a batch."""
    decoder: nn.Module = scorer.model.get_decoder()  # type: ignore[assignment]
    out = [torch.zeros(0)] * len(jobs)
    for batch in pack([len(job.row) - 1 for job in jobs], batch_positions, pass_positions(scorer.device, False)):
        counts = [jobs[i].scored + jobs[i].tail for i in batch]
        ids, mask = pad_rows([jobs[i].row[:-1] for i in batch])
        # Right padding under a causal mask: positions equal those of an unpadded pass.
        positions = torch.arange(ids.shape[1], device=scorer.device).expand(ids.shape)
        hidden = decoder(
            input_ids=ids.to(scorer.device),
            attention_mask=mask.to(scorer.device),
            use_cache=False,
            **position_arguments(decoder, positions),
        ).last_hidden_state
        wanted = torch.cat(
            [row[len(jobs[i].row) - 1 - n : len(jobs[i].row) - 1] for row, i, n in zip(hidden, batch, counts)]
        )
        targets = torch.tensor(
            [token for i, n in zip(batch, counts) for token in jobs[i].row[-n:]], device=hidden.device
        )
        for i, losses in zip(batch, token_losses(scorer, wanted, targets).cpu().split(counts)):
            out[i] = losses
    return out


@torch.no_grad()
def token_losses(scorer: Reader, hidden: Tensor, targets: Tensor) -> Tensor:
    """Returns ``-log p(target)`` in nats, ``[rows]`` float32.

    Args:
        scorer: the causal LM.
        hidden: ``[rows, width]`` last hidden states.
        targets: ``[rows]`` ids on the same device.
    """
    out = torch.empty(len(targets), device=hidden.device)
    rows = max(1, _LOGITS // scorer.vocab_size)
    for first in range(0, len(targets), rows):
        logits = scorer.head(hidden[first : first + rows]).float()
        wanted = targets[first : first + rows].to(logits.device)
        out[first : first + rows] = nn.functional.cross_entropy(logits, wanted, reduction="none").to(out.device)
    return out
