"""Runs `model.generate` on prepared inputs: batched or streamed, with stop strings.

`Reader` lays prompts out and prepares the inputs; nothing here knows about prompts or compressed passages.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .kv import layer_list
from .tokenization import clean

NEW_TOKENS = 32  # longest answer, unless another one is asked for
_END = object()
_OVERLAP = 32  # tokens of context in which a new token is decoded


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """The stop strings of a call: one string is one stop string.

    Raises:
        TypeError: for anything but strings.
        ValueError: for an empty string, which would end every answer at once, or a lone surrogate, which no answer holds.
    """
    found = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if bad := [s for s in found if not isinstance(s, str)]:
        raise TypeError(f"stop must be a string or a list of strings, got a {type(bad[0]).__name__} in it.")
    if "" in found:
        raise ValueError("A stop string must not be empty: it would end every answer before its first character.")
    if bad := [s for s in found if clean(s) != s]:
        raise ValueError(f"A stop string must not hold a lone surrogate, which no answer holds; got {bad[0]!r}.")
    return found


def make_config(
    max_new_tokens: int | None,
    given: GenerationConfig | None,
    kwargs: dict[str, Any],
    tokenizer: Any,
    eos_ids: list[int],
) -> GenerationConfig:
    """The generation config; fields of it are moved out of `kwargs`. Default: greedy."""
    if max_new_tokens is None:
        max_new_tokens = (None if given is None else given.max_new_tokens) or NEW_TOKENS
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    config = copy.deepcopy(given) if given is not None else GenerationConfig(do_sample=False, num_beams=1)
    for key in [k for k in kwargs if hasattr(config, k)]:
        setattr(config, key, kwargs.pop(key))
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    if (config.num_return_sequences or 1) != 1:
        raise ValueError("generate returns one answer per prompt; repeat the prompt to get several.")
    config.eos_token_id = config.eos_token_id if config.eos_token_id is not None else (eos_ids or None)
    if config.pad_token_id is None:
        pad = getattr(tokenizer, "pad_token_id", None)
        config.pad_token_id = pad if pad is not None else (eos_ids[0] if eos_ids else 0)
    return config


def generate_ids(
    model: Any,
    inputs: dict[str, Any],
    config: GenerationConfig,
    tokenizer: Any,
    stop: Sequence[str] | None,
    kwargs: dict[str, Any],
    streamer: BaseStreamer | None = None,
    criteria: StoppingCriteria | None = None,
) -> list[list[int]]:
    """New token ids per prompt, without end-of-sequence and padding."""
    options: dict[str, Any] = dict(kwargs)
    if stop:
        config.stop_strings = list(stop)
        options["tokenizer"] = tokenizer
    if criteria is not None:
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), criteria])
    out = model.generate(**inputs, generation_config=config, streamer=streamer, **options)
    skip = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # prompt ids are part of the output
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [cut_at_end(row, ends) for row in out[:, skip:].tolist()]


def stream_text(
    run: Callable[[BaseStreamer, StoppingCriteria], object],
    decode: Callable[[list[int]], str],
    stop: Sequence[str] | None,
) -> Iterator[str]:
    """Yields pieces of one answer as soon as they are final.

    `run` generates in a thread of its own, which ends when the iterator is closed; its errors are raised here.
    """
    tokens: queue.Queue[Any] = queue.Queue()
    cancelled = threading.Event()

    def work() -> None:
        try:
            with torch.no_grad():
                run(_QueueStreamer(tokens), Cancelled(cancelled))
            tokens.put(_END)
        except BaseException as error:
            tokens.put(error)

    thread = threading.Thread(target=work, name="nutgraf-stream", daemon=True)
    thread.start()
    pieces = Pieces(decode, stop)
    try:
        while (item := tokens.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            if piece := pieces.add(item):
                yield piece
            if pieces.stopped:
                return
        if piece := pieces.rest():
            yield piece
    finally:
        cancelled.set()
        thread.join()


class Pieces:
    """Turns the ids of an answer into pieces of text, each as soon as it is final.

    Args:
        decode: decodes ids.
        stop: strings that end the answer.

    Attributes:
        stopped: whether a stop string ended the answer; further ids are ignored.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] | None) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._written = _Written(decode)
        self._given = 0

    def add(self, token: int) -> str:
        """Return what is final after one more id; often nothing."""
        if self.stopped:
            return ""
        self._written.add(token)
        text, self.stopped = cut_at_stop(self._written.text, self._stop)
        # A character may still lack bytes, and the tail may be the beginning of a stop string.
        final = len(text) if self.stopped else len(text.rstrip("�")) - held_back(text, self._stop)
        return self._piece(text, final)

    def rest(self) -> str:
        """Return what was held back, after the last id."""
        text = cut_at_stop(self._decode(self._written.ids), self._stop)[0]
        return self._piece(text, len(text))

    def _piece(self, text: str, final: int) -> str:
        given, self._given = self._given, max(self._given, final)
        return text[given : self._given]


class _Written:
    """Decodes ids incrementally: a new id re-decodes only the last few."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode = decode
        self._start = 0  # first id that is decoded again
        self._before = 0  # characters of the text before it

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.text = self.text[: self._before] + self._decode(self.ids[self._start :])
        if len(self.ids) - self._start >= 2 * _OVERLAP:
            tail = self._decode(self.ids[-_OVERLAP:])
            # The tail may split a character or decode differently on its own; then wait for a later cut.
            if tail and self.text.endswith(tail):
                self._start, self._before = len(self.ids) - _OVERLAP, len(self.text) - len(tail)


class _QueueStreamer(BaseStreamer):
    def __init__(self, tokens: queue.Queue[Any]) -> None:
        self.tokens = tokens
        self.prompt = True

    def put(self, value: Tensor) -> None:
        ids = value.reshape(-1).tolist()
        # generate puts the prompt's ids first; there are none when the prompt is embeddings
        if self.prompt:
            self.prompt = False
            if value.dim() > 1:
                return
        for i in ids:
            self.tokens.put(i)

    def end(self) -> None:
        pass


class AbandonedError(Exception):
    """A forward pass was left because all its prompts are abandoned."""


_watching: ContextVar[tuple[Callable[[], bool], ...]] = ContextVar("watching", default=())


def _leave(*_: Any) -> None:
    if any(abandoned() for abandoned in _watching.get()):
        raise AbandonedError


@contextlib.contextmanager
def interruptible(model: Any, criteria: Iterable[Any]) -> Iterator[None]:
    """Context manager in which this thread's forward passes end between two layers once their prompts are abandoned.

    Prompts are abandoned when a criterion with the method ``abandoned`` says so. Raises `AbandonedError` then.
    """
    checks = tuple(criterion.abandoned for criterion in criteria if hasattr(criterion, "abandoned"))
    if not checks:
        yield
        return
    hooks = [layer.register_forward_pre_hook(_leave) for layer in layer_list(model.get_decoder())[1]]
    token = _watching.set(checks)
    try:
        yield
    finally:
        _watching.reset(token)
        for hook in hooks:
            hook.remove()


class Cancelled(StoppingCriteria):
    """Ends generation once the event is set: in the current step, between two layers."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def abandoned(self) -> bool:
        """Whether all prompts are abandoned."""
        return self.event.is_set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def cut_at_end(ids: list[int], ends: Sequence[int | None]) -> list[int]:
    """Ids up to the first end-of-sequence token."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def cut_at_stop(text: str, stop: Sequence[str] | None) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [at for s in stop or () if (at := text.find(s)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def held_back(text: str, stop: Sequence[str] | None) -> int:
    """Number of characters at the end of the text that may begin a stop string."""
    longest = 0
    for s in stop or ():
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest
