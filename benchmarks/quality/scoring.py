"""Answers of a reader, and its probabilities of reference answers, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...compressors import Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece
from .. import metrics

Advance = Callable[[int], None]
_CHUNK_ELEMENTS = 2**25  # logits held at once while distributions are compared (128 MiB in float32)


@dataclass(frozen=True)
class Likelihood:
    """The reader over one reference answer: last hidden states `[tokens, hidden]` that predict its tokens (on the CPU), and
    their log-probabilities `[tokens]`."""

    hidden: Tensor
    log_probs: Tensor


def answers(
    reader: Reader,
    prompts: Sequence[list[Piece]],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = lambda n: None,
) -> list[str]:
    """Greedy answers up to the first line break, stripped, in the order of the prompts."""
    found = [""] * len(prompts)
    for part in batches([reader.length(prompt) for prompt in prompts], batch_size):
        texts = reader.generate([prompts[i] for i in part], max_new_tokens, stop=["\n"])
        for i, text in zip(part, texts):
            found[i] = text.strip()
        advance(len(part))
    return found


def score_each(predictions: Sequence[str], records: Sequence[Record]) -> dict[str, np.ndarray]:
    """EM, F1 and containment of each answer, `[records]`."""
    scorers = {"em": metrics.exact_match, "f1": metrics.f1, "containment": metrics.containment}
    pairs = [(guess, record.answers) for guess, record in zip(predictions, records)]
    return {name: np.array([score(*pair) for pair in pairs]) for name, score in scorers.items()}


@torch.no_grad()
def likelihoods(
    reader: Reader,
    prompts: Sequence[list[Piece]],
    references: Sequence[Sequence[int]],
    *,
    batch_size: int,
    advance: Advance = lambda n: None,
) -> list[Likelihood]:
    """The reader's states and log-probabilities over each reference answer's tokens, teacher-forced."""
    found: list[Likelihood | None] = [None] * len(prompts)
    for part in batches([reader.length(prompt) for prompt in prompts], batch_size):
        targets = reader.target_hidden([prompts[i] for i in part], [list(references[i]) for i in part])
        log_probs = torch.cat(
            [
                torch.log_softmax(reader.head(hidden).float(), -1).gather(1, ids[:, None])[:, 0]
                for hidden, ids in zip(_chunks(targets.hidden, reader), _chunks(targets.ids, reader))
            ]
        ).cpu()
        sizes = [len(references[i]) for i in part]
        for i, hidden, log_prob in zip(part, targets.hidden.cpu().split(sizes), log_probs.split(sizes)):
            found[i] = Likelihood(hidden.clone(), log_prob.clone())
        advance(len(part))
    return found  # type: ignore[return-value]


@torch.no_grad()
def kl_divergence(reader: Reader, full: Likelihood, other: Likelihood) -> float:
    """Mean over the answer's tokens of KL(full || other) between the reader's next-token distributions, in nats."""
    if full.hidden.shape != other.hidden.shape:
        raise ValueError(
            f"Both sides must cover the same answer tokens, got {len(full.hidden)} and {len(other.hidden)} of them."
        )
    total = 0.0
    for a, b in zip(_chunks(full.hidden, reader), _chunks(other.hidden, reader)):
        p = torch.log_softmax(reader.head(a.to(reader.device)).float(), -1)
        q = torch.log_softmax(reader.head(b.to(reader.device)).float(), -1)
        total += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
    return max(total / len(full.hidden), 0.0)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, so that running out of memory shows at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _chunks(rows: Tensor, reader: Reader) -> tuple[Tensor, ...]:
    return rows.split(max(1, _CHUNK_ELEMENTS // reader.vocab_size))
