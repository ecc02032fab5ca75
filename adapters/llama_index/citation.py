"""LlamaIndex's citation query engine with numbered, compressed sources."""

from __future__ import annotations

from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from .nodes import read_as, text_of


class CompressedCitationQueryEngine(CitationQueryEngine):
    """A `CitationQueryEngine` whose LLM reads the compressed passages of a `CompressedContextPostprocessor`.

    LlamaIndex's own engine cuts each node's text into sources, which the LLM then reads as text. Here each node is one
    source: the text "Source 1:" comes before its compressed passage (or its text), and ``source_nodes`` contain the number
    and the original text. Make the index's chunks as small as the citations should be.

    Takes the arguments of `CitationQueryEngine` and ``from_args``; ``citation_chunk_size`` and ``text_splitter`` have no
    effect, and ``multimodal`` is refused.

    Example::

        engine = CompressedCitationQueryEngine.from_args(
            index, llm=CompressedContextLLM(reader), node_postprocessors=[CompressedContextPostprocessor(compressor)]
        )
    """

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        if self._multimodal:
            raise ValueError(
                "CompressedCitationQueryEngine reads text and compressed passages; leave multimodal out, or use LlamaIndex's "
                "CitationQueryEngine for images."
            )
        sources = []
        for number, scored in enumerate((n for n in nodes if text_of(n.node) is not None), start=1):
            node = scored.node
            read = node.get_content(MetadataMode.LLM)
            source = read_as(node, f"Source {number}:\n{read}\n", getattr(node, "_placeholders", None))
            source.set_content(f"Source {number}:\n{text_of(node)}\n")
            if isinstance(source, TextNode):
                source.start_char_idx = source.end_char_idx = None  # the number is no part of the document
            sources.append(NodeWithScore.model_construct(node=source, score=scored.score))
        return sources
