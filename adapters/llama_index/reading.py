"""One timed call of the reader for LlamaIndex."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...compressors import CompressedPassage, Reader
from ...compressors.reader.plan import PromptPlan
from ..openai import ServedReader
from ..threads import ends_with


class ReaderRefusedError(RuntimeError):
    """The reader refused a prompt, for instance because it is empty or too long.

    Not a ``ValueError``, because LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


@dataclass(frozen=True)
class Answer:
    """The answer so far, its newest piece, and counts and times (see `CompressedContextLLM`)."""

    text: str
    delta: str
    raw: dict[str, int | float]


class ReaderCall:
    """A prompt for a reader, made when it is called, and answered at once or streamed."""

    def __init__(
        self,
        reader: Reader | ServedReader,
        make_prompt: Callable[[], list[Any]],
        chat: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.reader = reader
        self.make_prompt = make_prompt
        self.options = {**settings, "chat": chat}

    def run(self, stopped: threading.Event | None = None) -> Answer:
        """Return the whole answer, or what there is when ``stopped`` is set."""
        given = self.options.get("num_beams") or getattr(self.options.get("generation_config"), "num_beams", None)
        if (given or 1) > 1:
            return self._run_beams(stopped)
        answer = Answer("", "", {})
        with closing(self.stream(stopped)) as answers:  # type: ignore[type-var]
            for answer in answers:  # noqa: B007
                if stopped is not None and stopped.is_set():
                    break
        return answer

    def stream(self, stopped: threading.Event | None = None) -> Iterator[Answer]:
        """Yield the growing answer, at least once. Refusals are raised at the call, not at the first item."""
        start = time.perf_counter()
        with _refusals():
            plan, counts = self._plan()
            pieces = self.reader.stream(plan, **ends_with(self.reader, stopped, self.options))
        return self._grow(counts, pieces, start)

    def _grow(self, counts: dict[str, int | float], pieces: Iterator[str], start: float) -> Iterator[Answer]:
        text = ""
        raw: dict[str, int | float] = {}
        try:
            while True:
                with _refusals():
                    piece = next(pieces, None)
                now = (time.perf_counter() - start) * 1e3
                raw = {**(raw or {**counts, "ttft_ms": now}), "ms": now}
                if piece is None:
                    break
                text += piece
                yield Answer(text, piece, raw)
            yield Answer(text, "", raw)
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def _run_beams(self, stopped: threading.Event | None) -> Answer:
        start = time.perf_counter()
        with _refusals():
            plan, counts = self._plan()
            text = self.reader.generate([plan], **ends_with(self.reader, stopped, self.options))[0]
        now = (time.perf_counter() - start) * 1e3
        return Answer(text, text, {**counts, "ttft_ms": now, "ms": now})

    def logprob(self, answer: str) -> float:
        """Return the log-likelihood in nats of a given answer, summed over its tokens."""
        if not isinstance(self.reader, Reader):
            raise ReaderRefusedError("A server gives no log-likelihoods of answers; score with the local Reader.")
        with _refusals(), torch.no_grad():
            (logits,) = self.reader.target_logits([self.make_prompt()], [answer], chat=self.options["chat"])
        ids = torch.tensor(self.reader.tokenize(answer), device=logits.device)
        return float(logits.float().log_softmax(-1).gather(-1, ids[:, None]).sum())

    def _plan(self) -> tuple[PromptPlan, dict[str, int | float]]:
        """Lay the prompt out once and count its contents."""
        prompt = self.make_prompt()
        (plan,) = self.reader.plan([prompt], chat=self.options["chat"], **(self.options.get("template") or {}))
        atoms = [atom for item in prompt for atom in (item["content"] if isinstance(item, dict) else [item])]
        passages = [atom for atom in atoms if isinstance(atom, CompressedPassage)]
        return plan, {
            "reader_tokens": len(plan),
            "passages": len(passages),
            "slots": sum(passage.slots for passage in passages),
            "source_tokens": sum(passage.source_tokens for passage in passages),
        }


def check_served(reader: ServedReader) -> None:
    """Raise ``ValueError`` for a served reader whose settings do not fit prompts from LlamaIndex."""
    if reader.engine == "vllm-chat":
        raise ValueError(
            "LlamaIndex's prompts are laid out and templated here, but engine='vllm-chat' leaves that to the server; use "
            "ServedReader(engine='vllm'), and chat=True for the chat template."
        )
    if reader.fallback is not None:
        raise ValueError(
            "fallback='text' needs the passages' texts in every call, which LlamaIndex's prompts do not carry; make the "
            "ServedReader without it. Its errors are raised by the query engine."
        )


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ReaderRefusedError(str(error)) from error
