"""What the adapter tells LlamaIndex's instrumentation."""

from __future__ import annotations

from llama_index.core.instrumentation.events.base import BaseEvent


class CompressionEvent(BaseEvent):
    """Passages of a request, or of a batch that is indexed, were compressed or found compressed.

    What the LLM then made of them is in the ``raw`` of its own ``LLMCompletionEndEvent`` or ``LLMChatEndEvent``.

    Attributes:
        passages: passages that are read in compressed form.
        compressed: passages that had to be compressed now.
        cache_hits: passages that were found compressed, in the cache or the store.
        source_tokens: reader tokens of the texts of ``passages``.
        slots: reader positions they take now.
        as_text: nodes that the LLM reads as text: by policy, because they hold no text to compress, or as a fallback.
        fallbacks: of these, the nodes that were to be compressed and could not be.
        unfaithful: of these, the nodes whose passages did not survive their compression, by the fidelity gate.
        left_out: nodes that found no room in a policy's budget.
        ms: milliseconds from the request to the last passage.
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
        """The name under which LlamaIndex logs the event."""
        return "CompressionEvent"
