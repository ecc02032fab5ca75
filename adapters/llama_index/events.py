"""What the adapter tells LlamaIndex's instrumentation."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class CompressionEvent(BaseEvent):
    """Passages of a request were compressed, or found compressed.

    Attributes:
        passages: passages that the LLM reads in compressed form.
        compressed: how many of these had to be compressed now; the others were in the cache.
        source_tokens: reader tokens of their texts.
        slots: reader positions they take now.
        ms: milliseconds from the request to the last passage.
    """

    passages: int
    compressed: int
    source_tokens: int
    slots: int
    ms: float

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex logs the event."""
        return "CompressionEvent"
