"""LlamaIndex: compressed passages in a query engine, by changing two lines.

Example::

    from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor

    engine = index.as_query_engine(
        llm=CompressedContextLLM(reader),
        node_postprocessors=[CompressedContextPostprocessor(compressor)],
    )

All response modes of LlamaIndex work, sync and async, streamed or not, for completion and chat readers: the two exchange
ordinary short strings (see `nutgraf.adapters.placeholders.placeholder`).
"""

from __future__ import annotations

from ..placeholders import PassageCache, PlaceholderError, PlaceholderStore, escape_placeholders
from .citation import CompressedCitationQueryEngine
from .embedding import SentenceTransformerEmbedding
from .events import CompressionEvent
from .ingestion import CompressPassages, PassagesStoredEvent, StoreRetriever
from .llm import CompressedContextLLM
from .nodes import CompressedDocument, CompressedIndexNode, CompressedNode, CompressedTextNode
from .policy import AutoBudget, Form, Policy, ScoreBudget, TextAbove, TextBelowFidelity, TextForTop, TokenBudget
from .postprocessor import CompressedContextPostprocessor
from .prompt_helper import SlotAwarePromptHelper, SlotAwareTokenizer
from .reading import ReaderRefusedError
from .recovery import recover_words
from .reranker import CompressedReranker
from .synthesizer import PassageScores

__all__ = [
    "AutoBudget",
    "CompressPassages",
    "CompressedCitationQueryEngine",
    "CompressedContextLLM",
    "CompressedContextPostprocessor",
    "CompressedDocument",
    "CompressedIndexNode",
    "CompressedNode",
    "CompressedReranker",
    "CompressedTextNode",
    "CompressionEvent",
    "Form",
    "PassageCache",
    "PassageScores",
    "PassagesStoredEvent",
    "PlaceholderError",
    "PlaceholderStore",
    "Policy",
    "ReaderRefusedError",
    "ScoreBudget",
    "SentenceTransformerEmbedding",
    "SlotAwarePromptHelper",
    "SlotAwareTokenizer",
    "StoreRetriever",
    "TextAbove",
    "TextBelowFidelity",
    "TextForTop",
    "TokenBudget",
    "escape_placeholders",
    "recover_words",
]
