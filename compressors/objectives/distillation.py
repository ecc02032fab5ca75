"""Distillation: match the reader's predictions from the slots to its predictions from the text."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.hidden import hide
from .chunked import ChunkedLoss, Head, Other
from .registry import Objective, Scored, Setup, register_objective
from .teacher import TeacherLogits, with_tail


@register_objective("kl")
class KLDistillationLoss(ChunkedLoss, Objective):
    r"""KL divergence from the reader's predictions after the text (teacher) to those after the slots (student):
    :math:`L_{KL} = T^2 \sum_i D_{KL}\big(p_T(\cdot \mid x, q, a_{<i}) \,\|\, p_T(\cdot \mid z, q, a_{<i})\big)`,
    with :math:`p_T = \mathrm{softmax}(\text{logits} / T)`.

    Teacher and student are the same frozen reader, or the student is a tuned copy. Rows of both must belong to the same
    target tokens: call `Reader.target_hidden` with the same targets.

    With `top_k`, the teacher's k most likely tokens keep their probabilities and all others form one more outcome, for
    both. Nothing is renormalised, so probability that the student puts outside the top k counts.

    With `reverse` = r, the divergence goes both ways (KV-Distill, with r = 0.4):
    :math:`(1 - r) D_{KL}(teacher \,\|\, student) + r D_{KL}(student \,\|\, teacher)`. The second term keeps the student from
    putting probability where the teacher has none.

    Args:
        head: hidden states ``[n, d]`` to logits ``[n, V]``: `Reader.head`.
        temperature: T; the factor T squared keeps the gradient's size.
        top_k: number of the teacher's tokens, None for all.
        chunk: rows whose logits exist at the same time.
        teacher_head: the teacher's head, if the student's is trained.
        reverse: share of the reverse divergence, from 0 to 1.

    References:
        - Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
        - Cheng et al., xRAG, arXiv 2405.13792, eq. 4.
        - Chari et al., KV-Distill, arXiv 2503.10337 (both ways).

    Inputs:
        hidden: ``[N, d]`` student's hidden states, slots in the prompt.
        teacher: ``[N, d]`` teacher's hidden states, text in the prompt, used without gradient; or stored `TeacherLogits`,
            whose `top_k` is used and whose temperature must equal this one.
        weights, num_items: ``[N]`` weights of the rows, default 1; divisor, default the sum of the weights.

    Memory:
        At most ``24 * min(N, chunk) * V`` bytes (float32 logits and log-probabilities of both, the terms, the gradient), with
        `reverse` 32 instead of 24.
        Of the teacher only hidden states ``[N, d]`` are kept, never logits.

    Example:
        >>> loss = KLDistillationLoss(reader.head, temperature=1.0)
        >>> with torch.no_grad():
        ...     teacher = reader.target_hidden([[text, question]], [answer])
        >>> student = reader.target_hidden([[passage, question]], [answer])
        >>> loss(student.hidden, teacher.hidden).backward()
    """

    targets = frozenset({"answer", "continuation"})
    teacher_head: Head
    teacher = True

    def __init__(
        self,
        head: Head,
        temperature: float = 1.0,
        top_k: int | None = None,
        chunk: int = 512,
        teacher_head: Head | None = None,
        reverse: float = 0.0,
    ) -> None:
        super().__init__(head, chunk)
        hide(self, "teacher_head", teacher_head or head)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for the whole vocabulary, got {top_k}.")
        if not 0 <= reverse <= 1:
            raise ValueError(f"reverse is the share of the reverse divergence and must lie in [0, 1], got {reverse}.")
        self.temperature, self.top_k, self.reverse = temperature, top_k, reverse

    @classmethod
    def create(cls, setup: Setup) -> Self:
        compressor = setup.compressor
        teacher_head = compressor.base_reader.head
        return cls(
            compressor.reader.head, setup.temperature, setup.top_k, teacher_head=teacher_head, reverse=setup.reverse
        )

    def total(self, scored: Scored) -> Tensor:
        if scored.teacher is None:
            raise ValueError("Distillation needs the teacher's predictions, got None.")
        return self(scored.hidden, scored.teacher, num_items=1)

    def _rows(self, hidden: Tensor, other: Other) -> Tensor:
        if isinstance(other, TeacherLogits):
            student = with_tail(self._logits(hidden) / self.temperature, other.ids)
            return self._divergence(student, other.logprobs)
        with torch.no_grad():
            teacher = self._logits(other, self.teacher_head) / self.temperature
        student = self._logits(hidden) / self.temperature
        if self.top_k is not None and self.top_k < teacher.shape[-1]:
            kept = teacher.topk(self.top_k, dim=-1).indices
            teacher, student = with_tail(teacher, kept), with_tail(student, kept)
        else:
            teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
        return self._divergence(student, teacher)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        found = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        if self.reverse:
            back = F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
            found = (1 - self.reverse) * found + self.reverse * back
        return found * self.temperature**2

    def forward(
        self, hidden: Tensor, teacher: Other, weights: Tensor | None = None, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; inputs as in the class."""
        got = [len(teacher), *hidden.shape[1:]] if isinstance(teacher, TeacherLogits) else list(teacher.shape)
        if got != list(hidden.shape):
            raise ValueError(
                f"Teacher and student need the same target positions, got {got} and {list(hidden.shape)}; take both from "
                "target_hidden with the same targets."
            )
        kept = teacher if isinstance(teacher, TeacherLogits) else teacher.detach()
        return self._reduce(hidden, kept, weights, num_items)
