"""Answers in OpenAI's format, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from .batching import Answered


class Reply:
    """Formats the answers to one request, a chat or a completion."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self.kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answered], prompt_tokens: int) -> dict[str, Any]:
        """Return the whole answer."""
        choices = []
        for i, answer in enumerate(answers):
            text = {"role": "assistant", "content": answer.text} if self.chat else answer.text
            content = {"message" if self.chat else "text": text}
            choices.append({"index": i, **content, "logprobs": None, "finish_reason": answer.finish})
        usage = _usage(prompt_tokens, sum(answer.tokens for answer in answers))
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events before the first piece."""
        return [self._event({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def piece(self, text: str, finish: str | None = None) -> dict[str, Any]:
        """Return the event of a piece, or of the end and its reason."""
        return self._event({"delta": {"content": text} if text else {}} if self.chat else {"text": text}, finish)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """Return the event with the token counts."""
        return {**self._event({}), "choices": [], "usage": _usage(prompt_tokens, completion_tokens)}

    def _event(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": self.kind + (".chunk" if self.chat else ""), "choices": [choice]}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
