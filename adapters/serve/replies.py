"""Answers in OpenAI's format, whole and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .batching import Answered


@dataclass(frozen=True)
class Usage:
    """Positions of the prompts, including slots, and generated tokens."""

    prompt: int
    completion: int

    def to_dict(self) -> dict[str, int]:
        """Return the counts under OpenAI's names."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Reply:
    """Format of the answers to one kind of request; ``created`` is in seconds since 1970."""

    model: str
    id: str
    created: int
    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [
            {"index": i, **self._content(answer.text), "logprobs": None, "finish_reason": answer.finish}
            for i, answer in enumerate(answers)
        ]
        return {**self._head(self.object), "choices": choices, "usage": usage.to_dict()}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events before the first piece."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """Return the event of a piece."""
        return self._event(self._delta(text), None)

    def closing(self, finish: str) -> dict[str, Any]:
        """Return the event with the reason why the answer ended."""
        return self._event(self._delta(""), finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the event with the counts."""
        return {**self._head(self.chunk), "choices": [], "usage": usage.to_dict()}

    def _event(self, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish}
        return {**self._head(self.chunk), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class CompletionReply(Reply):
    """For ``/v1/completions``."""

    prefix = "cmpl"
    object = "text_completion"
    chunk = "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content


class ChatReply(Reply):
    """For ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [self._event({"delta": {"role": "assistant", "content": ""}}, None)]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
