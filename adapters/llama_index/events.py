"""Instrumentation event of the postprocessor."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class CompressionEvent(BaseEvent):
    """The passages of a request were compressed or found compressed.

    The LLM's own counts are in the ``raw`` of its ``LLMCompletionEndEvent`` or ``LLMChatEndEvent``.

    Attributes:
        passages: passages read in compressed form.
        compressed: passages compressed now.
        cache_hits: passages found in the cache or the store.
        source_tokens: reader tokens of the texts of ``passages``.
        slots: reader positions of ``passages``.
        as_text: nodes read as text: by policy, without text to compress, or as a fallback.
        fallbacks: nodes among these that could not be compressed.
        unfaithful: nodes among these that the fidelity gate sent back to text.
        left_out: nodes without room in the policy's budget.
        ms: milliseconds for the request.
    """

    passages: int
    compressed: int
    cache_hits: int = 0
    source_tokens: int
    slots: int
    as_text: int = 0
    fallbacks: int = 0
    unfaithful: int = 0
    left_out: int = 0
    ms: float

    @classmethod
    def class_name(cls) -> str:
        return "CompressionEvent"
