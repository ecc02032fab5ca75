"""Answers in OpenAI's form, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .batching import Answered


@dataclass(frozen=True)
class Usage:
    """Counts of a request.

    Attributes:
        prompt: positions that the prompts take, slots included.
        completion: tokens that were made.
    """

    prompt: int
    completion: int

    def to_dict(self) -> dict[str, int]:
        """As OpenAI names them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Reply:
    """What a kind of request is answered with.

    Attributes:
        model: the model's name.
        id: the request's.
        created: seconds since 1970.
    """

    model: str
    id: str
    created: int
    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]

    def whole(self, answers: Sequence[Answered], usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        choices = [
            {"index": i, **self._content(answer.text), "logprobs": None, "finish_reason": answer.finish}
            for i, answer in enumerate(answers)
        ]
        return {**self._head(self.object), "choices": choices, "usage": usage.to_dict()}

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first piece."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """The event of a piece."""
        return self._event(self._delta(text), None)

    def closing(self, finish: str) -> dict[str, Any]:
        """The event that says why the answer ended."""
        return self._event(self._delta(""), finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The event with the counts."""
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
        """The role."""
        return [self._event({"delta": {"role": "assistant", "content": ""}}, None)]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
