"""Dynamic batching of concurrent prompts."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ...compressors import Reader
from ...compressors.reader.generation import cut_at_end, cut_at_stop
from ...compressors.reader.plan import PromptPlan
from .errors import RequestError
from .limits import Limits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerOptions:
    """Options of an answer; prompts with equal options can be read together.

    ``sampling``: further options of the reader's ``generate`` as sorted pairs; empty for greedy.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()

    def to_kwargs(self) -> dict[str, Any]:
        """Return arguments of the reader's ``generate`` and ``stream``."""
        return {"max_new_tokens": self.max_new_tokens, "stop": list(self.stop) or None, **dict(self.sampling)}


@dataclass(frozen=True)
class Answered:
    """An answer, its number of tokens, and ``"stop"`` (ended by model or stop string) or ``"length"`` (cut)."""

    text: str
    tokens: int
    finish: str


@dataclass
class _Job:
    plan: PromptPlan
    options: AnswerOptions
    future: Future[Answered] = field(default_factory=Future)  # never "running", so that it can be cancelled at any time

    def settle(self, answer: Answered | BaseException) -> None:
        with suppress(InvalidStateError):  # it was cancelled
            if isinstance(answer, BaseException):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)


class Batcher:
    """A thread that reads queued prompts in batches. Thread-safe.

    The oldest prompt is always in the next batch; later ones with equal options join it, within ``limits``. A prompt whose
    future is cancelled leaves the queue, and its generation ends after the current step.

    Attributes:
        batches: sizes of recent batches.
        on_batch: called with the size of each batch.
    """

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self.reader = reader
        self.limits = limits
        self.batches: deque[int] = deque(maxlen=1000)
        self.on_batch: Callable[[int], object] = lambda size: None
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="nutgraf-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of queued prompts."""
        with self._changed:
            self._drop_cancelled()
            return len(self._jobs)

    def _drop_cancelled(self) -> None:
        self._jobs = deque(job for job in self._jobs if not job.future.cancelled())

    @property
    def alive(self) -> bool:
        """Whether the thread accepts prompts."""
        return self._thread.is_alive() and not self._closed

    def submit(self, plans: Sequence[PromptPlan], options: AnswerOptions) -> list[Future[Answered]]:
        """Queue prompts. Raises ``RequestError``: 429 if too many wait, 503 if the server is shutting down."""
        jobs = [_Job(plan, options) for plan in plans]
        with self._changed:
            if not self.alive:
                raise RequestError("The server is shutting down.", 503)
            self._drop_cancelled()
            if len(self._jobs) + len(jobs) > self.limits.max_queue:
                raise RequestError(f"{len(self._jobs)} prompts are waiting already; try again later.", 429)
            self._jobs.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Finish the running batch and refuse the others."""
        with self._changed:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in left:
            job.settle(RequestError("The server is shutting down.", 503))
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self.batches.append(len(batch))
            self.on_batch(len(batch))
            try:
                answers = self._generate(batch)
            except BaseException as error:
                if len(batch) == 1:
                    batch[0].settle(error)
                else:
                    self._one_by_one(batch, error)
                continue
            for job, answer in zip(batch, answers):
                job.settle(answer)

    def _generate(self, batch: Sequence[_Job]) -> list[Answered]:
        plans = [job.plan for job in batch]
        return generate(self.reader, plans, batch[0].options, lambda i: batch[i].future.cancelled())

    def _one_by_one(self, batch: Sequence[_Job], error: BaseException) -> None:
        """Retry a failed batch prompt by prompt: one bad prompt, or too little memory, must not affect the others."""
        _log.warning("A batch of %d prompts failed (%s); they are read one by one.", len(batch), error)
        for job in batch:
            if job.future.cancelled():
                continue
            try:
                job.settle(self._generate([job])[0])
            except BaseException as own:
                job.settle(own)

    def _next(self) -> list[_Job]:
        """Wait for the next batch; empty when closed."""
        while not (batch := self._take()) and not self._closed:
            pass  # all waiting prompts were cancelled
        return batch

    def _take(self) -> list[_Job]:
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            self._drop_cancelled()
            until = time.monotonic() + self.limits.max_wait_ms / 1e3
            while not self._closed and len(self._jobs) < self.limits.max_batch:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch: list[_Job] = []
            later: list[_Job] = []
            longest = 0
            while self._jobs:
                job = self._jobs.popleft()
                widest = max(longest, len(job.plan) + job.options.max_new_tokens)
                fits = len(batch) < self.limits.max_batch
                fits = fits and (not batch or widest * (len(batch) + 1) <= self.limits.max_batch_positions)
                if not fits or (batch and job.options != batch[0].options):
                    later.append(job)
                elif not job.future.cancelled():
                    batch.append(job)
                    longest = widest
            self._jobs.extend(later)
            return batch


def generate(
    reader: Reader,
    plans: Sequence[PromptPlan],
    options: AnswerOptions,
    cancelled: Callable[[int], bool] = lambda place: False,
) -> list[Answered]:
    """Answer prompts of equal options in one batch, which ends when all prompts that are left are ``cancelled``."""
    order = sorted(range(len(plans)), key=lambda i: len(plans[i]))  # the reader's own order
    seen = _Seen(lambda: [cancelled(i) for i in order])
    texts = reader.generate(
        [plans[i] for i in order], **options.to_kwargs(), stopping_criteria=StoppingCriteriaList([seen])
    )
    answers: list[Answered | None] = [None] * len(plans)
    for i, text, row in zip(order, texts, seen.rows() or [[]] * len(plans)):
        ids = cut_at_end(row, reader.eos_ids)
        stopped = cut_at_stop(reader.decode(ids), options.stop)[1]
        made = len(ids) if not stopped else len(reader.tokenize(text))
        ended = stopped or len(ids) < options.max_new_tokens
        answers[i] = Answered(text, made, "stop" if ended else "length")
    return answers  # type: ignore[return-value]


class _Seen(StoppingCriteria):
    """Records the generated ids; stops the cancelled prompts."""

    def __init__(self, cancelled: Callable[[], list[bool]]) -> None:
        self.cancelled = cancelled
        self.steps = 0
        self.ids: Tensor | None = None

    def abandoned(self) -> bool:
        """Whether all prompts are cancelled; the forward pass then ends too."""
        return all(self.cancelled())

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.steps += 1
        self.ids = input_ids
        return torch.tensor(self.cancelled(), dtype=torch.bool, device=input_ids.device)

    def rows(self) -> list[list[int]]:
        """Return the new ids of each prompt."""
        return [] if self.ids is None else self.ids[:, -self.steps :].tolist()
