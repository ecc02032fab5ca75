"""Training objectives over a reader's hidden states at target positions, in bounded memory.

What a soft compressor learns from is what the frozen reader predicts after reading its slots. The reader gives the hidden
states ``[N, d]`` that predict the N target tokens of a batch (`Reader.target_hidden`) and its own `head` turns them into
logits, soft-capping and scaling included. The objectives call the head on `chunk` rows at a time and form each chunk's
gradient beside its value, so that never more than ``chunk x vocabulary`` logits exist, however long the targets are, and the
head runs once. (A head that is trained is recomputed in the backward pass instead.)

Every objective is ``sum_i w_i loss_i / num_items``. `num_items` defaults to the sum of the weights (a mean); with the total
over an accumulated batch instead, accumulated gradients equal those of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .teacher_logits import TeacherLogits, with_tail

Head = Callable[[Tensor], Tensor]
Other = Tensor | TeacherLogits  # what a row is compared with


class _SumOfChunks(torch.autograd.Function):
    """A sum over chunks of rows, whose gradient is formed chunk by chunk beside its value."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, loss: Callable[..., Tensor], chunk: int, other: Other, weights: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                value = loss(rows, other[part], weights[part])
            (gradient[part],) = torch.autograd.grad(value, rows)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None


class _ChunkedLoss(nn.Module):
    """Sums a loss over rows, `chunk` rows at a time."""

    def __init__(self, head: Head, chunk: int = 512) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk is a number of rows and must be at least 1, got {chunk}.")
        self._held: tuple[Head, ...] = (
            head,
        )  # a tuple hides a head that is a module: its weights are the reader's, not the objective's
        self.chunk = chunk

    @property
    def head(self) -> Head:
        """Hidden states ``[n, d]`` to logits ``[n, vocabulary]``."""
        return self._held[0]

    def _logits(self, hidden: Tensor, head: Head | None = None) -> Tensor:
        """Logits in at least float32: a softmax over a large vocabulary is not for bfloat16."""
        logits = (head or self.head)(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _rows(self, hidden: Tensor, other: Any) -> Tensor:
        raise NotImplementedError

    def _sum(self, hidden: Tensor, other: Other, weights: Tensor) -> Tensor:
        return (self._rows(hidden, other) * weights).sum()

    def _trains_head(self, hidden: Tensor) -> bool:
        """Whether the head has parameters that want a gradient."""
        with torch.enable_grad():
            return self.head(hidden[:1].detach()).requires_grad

    def _reduce(self, hidden: Tensor, other: Other, weights: Tensor | None, num_items: float | Tensor | None) -> Tensor:
        n = hidden.shape[0]
        if hidden.dim() != 2:
            raise ValueError(f"Hidden states must be [rows, width], got {list(hidden.shape)}.")
        if weights is not None and weights.shape != (n,):
            raise ValueError(f"weights must hold one number a row, [{n}], got {list(weights.shape)}.")
        if weights is None:
            weights = hidden.new_ones(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not n:
            return hidden.sum() * 0.0
        if n <= self.chunk:
            total = self._sum(hidden, other, weights)
        elif hidden.requires_grad and torch.is_grad_enabled() and not self._trains_head(hidden):
            total = _SumOfChunks.apply(hidden, self._sum, self.chunk, other, weights)
        else:
            total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
            for start in range(0, n, self.chunk):
                part = slice(start, start + self.chunk)
                rows = (hidden[part], other[part], weights[part])
                total = total + checkpoint(self._sum, *rows, use_reentrant=False, preserve_rng_state=False)
        return total / (weights.sum() if num_items is None else num_items)


class _TokenLoss(_ChunkedLoss):
    """Negative log-likelihood of the target tokens."""

    def _rows(self, hidden: Tensor, other: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden), other, reduction="none")

    def forward(
        self, hidden: Tensor, ids: Tensor, weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The objective, a scalar; see the class."""
        if ids.shape != hidden.shape[:1]:
            raise ValueError(f"ids must hold one token a row, [{hidden.shape[0]}], got {list(ids.shape)}.")
        return self._reduce(hidden, ids, weights, num_items)


class AutoencodingLoss(_TokenLoss):
    r"""The reader, reading only the slots, must repeat the passage that they were made of:
    :math:`L_{AE} = -\sum_i \log p(t_i \mid z, \text{"repeat"}, t_{<i})`.

    It teaches slots to carry wording. Alone it teaches nothing about using them: give it a small share beside
    `LanguageModelingLoss` or `KLDistillationLoss`.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        chunk: rows whose logits exist at the same time.

    References:
        - Ge et al., In-context Autoencoder for Context Compression in a Large Language Model, arXiv 2307.06945, eq. 2.

    Inputs:
        +-------------+---------------------+------------------------------------------------------------------+
        | hidden      | ``[N, d]`` float    | reader's hidden state before each target token, slots in prompt  |
        | ids         | ``[N]`` int64       | the passage's tokens                                             |
        | weights     | ``[N]`` float, opt. | weight of each row; default 1                                    |
        | num_items   | number, opt.        | divisor; default the sum of the weights                          |
        +-------------+---------------------+------------------------------------------------------------------+

    Memory:
        Beside its inputs and their gradients ``12 * min(N, chunk) * V`` bytes (float32 logits, log-probabilities, gradient)
        in place of ``12 * N * V``: at V = 128,256 and N = 16,384, 0.8 GB instead of 25 GB.

    Example:
        >>> loss = AutoencodingLoss(reader.head)
        >>> found = reader.target_hidden([autoencoding_prompt(p) for p in compressor.encode(texts)], texts)
        >>> loss(found.hidden, found.ids).backward()
    """


class LanguageModelingLoss(_TokenLoss):
    r"""The reader, reading the slots in place of the passage, must go on as the text or the answer goes on:
    :math:`L_{LM} = -\sum_i \log p(a_i \mid z, q, a_{<i})`.

    In pretraining the target is the continuation of the passage (ICAE) or a paraphrase of it (xRAG's first stage); in
    instruction tuning it is the answer to a question.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        chunk: rows whose logits exist at the same time.

    References:
        - Ge et al., arXiv 2307.06945, eq. 3 (continuation).
        - Cheng et al., xRAG: Extreme Context Compression for Retrieval-augmented Generation with One Token,
          arXiv 2405.13792, eq. 2 and 3 (paraphrase, answer).

    Inputs:
        +-------------+---------------------+------------------------------------------------------------------+
        | hidden      | ``[N, d]`` float    | reader's hidden state before each target token, slots in prompt  |
        | ids         | ``[N]`` int64       | the continuation's or answer's tokens                            |
        | weights     | ``[N]`` float, opt. | weight of each row; default 1                                    |
        | num_items   | number, opt.        | divisor; default the sum of the weights                          |
        +-------------+---------------------+------------------------------------------------------------------+

    Memory:
        As `AutoencodingLoss`: ``12 * min(N, chunk) * V`` bytes at the most.

    Example:
        >>> loss = LanguageModelingLoss(reader.head)
        >>> prompt = [passage, "\n\nQuestion: Who signed it?\nAnswer:"]
        >>> found = reader.target_hidden([prompt], [" The mayor"], add_eos=True)
        >>> loss(found.hidden, found.ids).backward()
    """


class KLDistillationLoss(_ChunkedLoss):
    r"""The reader reading the slots must predict what it predicts when it reads the text:
    :math:`L_{KL} = T^2 \sum_i D_{KL}\big(p_T(\cdot \mid x, q, a_{<i}) \,\|\, p_T(\cdot \mid z, q, a_{<i})\big)`,
    with :math:`p_T = \mathrm{softmax}(\text{logits} / T)`.

    Teacher and student are the same frozen reader, or the student is tuned on top of it; they differ in what they read.
    Rows of both must belong to the same target tokens, which `Reader.target_hidden` on the same targets guarantees.

    With `top_k`, the teacher's k likeliest tokens keep their probabilities and all others form one more outcome, for
    teacher and student alike. So both stay distributions: no renormalising that would hide what the student puts
    outside the teacher's favourites.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        temperature: T; the factor T squared keeps the gradient's size.
        top_k: of the teacher's tokens, None for all.
        chunk: rows whose logits exist at the same time.
        teacher_head: the teacher's head, where the student's is trained.

    References:
        - Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
        - Cheng et al., xRAG, arXiv 2405.13792, eq. 4.

    Inputs:
        +-------------+---------------------+------------------------------------------------------------------+
        | hidden      | ``[N, d]`` float    | student: hidden states, slots in the prompt                      |
        | teacher     | ``[N, d]`` float    | hidden states, text in the prompt; no gradient flows into it;    |
        |             |                     | or `TeacherLogits` that were kept: `top_k` is then theirs, and   |
        |             |                     | their temperature must be this one                               |
        | weights     | ``[N]`` float, opt. | weight of each row; default 1                                    |
        | num_items   | number, opt.        | divisor; default the sum of the weights                          |
        +-------------+---------------------+------------------------------------------------------------------+

    Memory:
        At most ``24 * min(N, chunk) * V`` bytes (float32 logits and log-probabilities of both, the terms, the gradient);
        teacher logits are never kept, only its hidden states are: ``N * d``.

    Example:
        >>> loss = KLDistillationLoss(reader.head, temperature=1.0)
        >>> with torch.no_grad():
        ...     teacher = reader.target_hidden([[text, question]], [answer])
        >>> student = reader.target_hidden([[passage, question]], [answer])
        >>> loss(student.hidden, teacher.hidden).backward()
    """

    def __init__(
        self,
        head: Head,
        temperature: float = 1.0,
        top_k: int | None = None,
        chunk: int = 512,
        teacher_head: Head | None = None,
    ) -> None:
        super().__init__(head, chunk)
        self._held = (head, teacher_head or head)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for the whole vocabulary, got {top_k}.")
        self.temperature, self.top_k = temperature, top_k

    def _rows(self, hidden: Tensor, other: Other) -> Tensor:
        if isinstance(other, TeacherLogits):
            student = with_tail(self._logits(hidden) / self.temperature, other.ids)
            return self._divergence(student, other.logprobs)
        with torch.no_grad():
            teacher = self._logits(other, self._held[1]) / self.temperature
        student = self._logits(hidden) / self.temperature
        if self.top_k is not None and self.top_k < teacher.shape[-1]:
            kept = teacher.topk(self.top_k, dim=-1).indices
            teacher, student = with_tail(teacher, kept), with_tail(student, kept)
        else:
            teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
        return self._divergence(student, teacher)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * self.temperature**2

    def forward(
        self, hidden: Tensor, teacher: Other, weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The objective, a scalar; see the class."""
        got = [len(teacher), *hidden.shape[1:]] if isinstance(teacher, TeacherLogits) else list(teacher.shape)
        if got != list(hidden.shape):
            raise ValueError(
                f"Teacher and student need the same target positions, got {got} and {list(hidden.shape)}; take both from "
                "target_hidden with the same targets."
            )
        kept = teacher if isinstance(teacher, TeacherLogits) else teacher.detach()
        return self._reduce(hidden, kept, weights, num_items)
