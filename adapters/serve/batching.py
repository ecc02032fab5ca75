"""Dynamic batching of concurrent prompts."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ...compressors import Reader
from ...compressors.reader.generation import Pieces, cut_at_end, cut_at_stop
from ...compressors.reader.plan import PromptPlan, reading_order
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


@dataclass(eq=False)
class _Job:
    plan: PromptPlan
    options: AnswerOptions
    on_piece: Callable[[str], object] | None = None  # of a stream
    begun: bool = False  # whether a piece of a stream was given
    future: Future[Answered] = field(default_factory=Future)  # never "running", so that it can be cancelled at any time

    def give(self, piece: str) -> None:
        if piece and self.on_piece is not None and not self.future.cancelled():
            self.begun = True
            self.on_piece(piece)

    def settle(self, answer: Answered | BaseException) -> None:
        with suppress(InvalidStateError):  # it was cancelled
            if isinstance(answer, BaseException):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)


class Batcher:
    """Reads queued prompts in batches. Thread-safe.

    The oldest prompt is always in the next batch; later ones with equal options join it, within ``limits``. While a batch is
    read, a second one is begun only if a stream waits. A prompt whose future is cancelled leaves the queue, and its
    generation ends after the current step.

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
        self._threads = [
            threading.Thread(target=self._work, args=[only_streams], name="nutgraf-batcher", daemon=True)
            for only_streams in (False, True)
        ]
        for thread in self._threads:
            thread.start()

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
        """Whether prompts are accepted."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def submit(self, plans: Sequence[PromptPlan], options: AnswerOptions) -> list[Future[Answered]]:
        """Queue prompts. Raises ``RequestError``: 429 if too many wait, 503 if the server is shutting down."""
        return self._submit([_Job(plan, options) for plan in plans])

    def stream(self, plan: PromptPlan, options: AnswerOptions, on_piece: Callable[[str], object]) -> Future[Answered]:
        """Queue a prompt whose answer is also given in pieces, each as soon as it is final. Raises as `submit`.

        ``on_piece`` is called in a thread of the batcher, for the last time before the future is done.
        """
        return self._submit([_Job(plan, options, on_piece)])[0]

    def _submit(self, jobs: Sequence[_Job]) -> list[Future[Answered]]:
        with self._changed:
            if not self.alive:
                raise RequestError("The server is shutting down.", 503)
            self._drop_cancelled()
            if len(self._jobs) + len(jobs) > self.limits.max_queue:
                raise RequestError(f"{len(self._jobs)} prompts are waiting already; try again later.", 429)
            self._jobs.extend(jobs)
            self._changed.notify_all()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Finish the running batches and refuse the other prompts."""
        with self._changed:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in left:
            job.settle(RequestError("The server is shutting down.", 503))
        for thread in self._threads:
            thread.join()

    def _work(self, only_streams: bool) -> None:
        while batch := self._next(only_streams):
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
        listeners = {i: job for i, job in enumerate(batch) if job.on_piece is not None}
        return generate(self.reader, plans, batch[0].options, lambda i: batch[i].future.cancelled(), listeners)

    def _one_by_one(self, batch: Sequence[_Job], error: BaseException) -> None:
        """Retry a failed batch prompt by prompt: one bad prompt, or too little memory, must not affect the others."""
        _log.warning("A batch of %d prompts failed (%s); they are read one by one.", len(batch), error)
        for job in batch:
            if job.future.cancelled():
                continue
            if job.begun:  # what was given cannot be taken back
                job.settle(error)
                continue
            try:
                job.settle(self._generate([job])[0])
            except BaseException as own:
                job.settle(own)

    def _next(self, only_streams: bool) -> list[_Job]:
        """Wait for the next batch; empty when closed."""
        while not (batch := self._take(only_streams)) and not self._closed:
            pass  # all waiting prompts were cancelled, or are in the other thread's batch
        return batch

    def _take(self, only_streams: bool) -> list[_Job]:
        with self._changed:
            while not self._closed and not any(job.on_piece or not only_streams for job in self._jobs):
                self._changed.wait()
            self._drop_cancelled()
            until = time.monotonic() + self.limits.max_wait_ms / 1e3
            while not self._closed and len(self._jobs) < self.limits.max_batch:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch: list[_Job] = []
            later: deque[_Job] = deque()
            longest = 0
            first = [job for job in self._jobs if job.on_piece or not only_streams][:1]
            if not first:  # another thread took it
                return []
            for job in [*first, *(job for job in self._jobs if job not in first)]:
                widest = max(longest, len(job.plan) + job.options.max_new_tokens)
                fits = len(batch) < self.limits.max_batch
                fits = fits and (not batch or widest * (len(batch) + 1) <= self.limits.max_batch_positions)
                if not fits or (batch and job.options != batch[0].options):
                    later.append(job)
                elif not job.future.cancelled():
                    batch.append(job)
                    longest = widest
            self._jobs = later
            return batch


def generate(
    reader: Reader,
    plans: Sequence[PromptPlan],
    options: AnswerOptions,
    cancelled: Callable[[int], bool] = lambda place: False,
    listeners: Mapping[int, _Job] = MappingProxyType({}),
) -> list[Answered]:
    """Answer prompts of equal options in one batch, which ends when all prompts that are left are ``cancelled``.

    Listeners get the pieces of their prompts' answers, each as soon as it is final, and the answer when it ends.
    """
    order = reading_order(plans)
    written = {order.index(i): (Pieces(reader.decode, options.stop), job) for i, job in listeners.items()}
    answer = functools.partial(_answered, reader, options)
    seen = _Seen(lambda: [cancelled(i) for i in order], written, answer, reader.eos_ids)
    reader.generate([plans[i] for i in order], **options.to_kwargs(), stopping_criteria=StoppingCriteriaList([seen]))
    answers = {i: answer(row) for i, row in zip(order, seen.rows() or [[]] * len(plans))}
    for pieces, job in seen.writing.values():
        job.give(pieces.rest())
    return [answers[i] for i in range(len(plans))]


def _answered(reader: Reader, options: AnswerOptions, row: list[int]) -> Answered:
    """The answer that some new ids are, perhaps with what follows its end."""
    ids = cut_at_end(row, reader.eos_ids)
    text, stopped = cut_at_stop(reader.decode(ids), options.stop)
    made = len(ids) if not stopped else len(reader.tokenize(text))
    ended = stopped or len(ids) < options.max_new_tokens
    return Answered(text, made, "stop" if ended else "length")


class _Seen(StoppingCriteria):
    """Records the generated ids; gives pieces of streams, and settles those that end; stops the cancelled prompts."""

    def __init__(
        self,
        cancelled: Callable[[], list[bool]],
        written: dict[int, tuple[Pieces, _Job]],
        answered: Callable[[list[int]], Answered],
        ends: Sequence[int],
    ) -> None:
        self.cancelled = cancelled
        self.steps = 0
        self.ids: Tensor | None = None
        self.answered = answered
        self.ends = ends
        self.writing = dict(written)  # streams that have not ended

    def abandoned(self) -> bool:
        """Whether all prompts are cancelled; the forward pass then ends too."""
        return all(self.cancelled())

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.steps += 1
        self.ids = input_ids
        cancelled = self.cancelled()
        new = input_ids[:, -1].tolist() if self.writing else []
        for row, (pieces, job) in list(self.writing.items()):
            ended = new[row] in self.ends
            if not ended and not cancelled[row]:
                job.give(pieces.add(new[row]))
            if ended or pieces.stopped or cancelled[row]:
                del self.writing[row]  # padding follows
                job.give(pieces.rest())
                job.settle(self.answered(input_ids[row, -self.steps :].tolist()))
        return torch.tensor(cancelled, dtype=torch.bool, device=input_ids.device)

    def rows(self) -> list[list[int]]:
        """Return the new ids of each prompt."""
        return [] if self.ids is None else self.ids[:, -self.steps :].tolist()
