"""Compressors to text in LlamaIndex: budgets in tokens, and the source's words in answers."""

from __future__ import annotations

import pytest
from llama_index.core.base.response.schema import Response, StreamingResponse
from llama_index.core.schema import NodeWithScore, TextNode
from nutgraf import make_compressor
from nutgraf.adapters.llama_index import CompressedContextPostprocessor, CompressPassages, PassageCache, recover_words
from nutgraf.adapters.store import MemoryStore
from texts import CURIE, TREATY


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in (TREATY, CURIE)]


def test_a_budget_in_tokens_at_indexing_and_query_time(zoo):
    reader = zoo.reader("llama")
    compressor, store = make_compressor("selective-context", reader), MemoryStore()
    CompressPassages(compressor, store, max_tokens=9)([scored.node for scored in nodes()])
    assert store.stats.passages == 2
    post = CompressedContextPostprocessor(compressor, max_tokens=9, store=store, cache=PassageCache())
    for scored in post.postprocess_nodes(nodes()):
        assert 6 <= len(reader.tokenize(scored.node.llm_text)) <= 9
    assert store.stats.passages == 2
    with pytest.raises(ValueError, match="not both"):
        CompressedContextPostprocessor(compressor, ratio=2, max_tokens=9)
    with pytest.raises(ValueError, match="needs a compressor to text"):
        CompressedContextPostprocessor(make_compressor("kv-match", reader), max_tokens=9)


def test_an_answer_gets_the_words_of_its_sources_back(zoo):
    compressor = make_compressor("selective-context", zoo.reader("llama"), unit="word", keep=["thirty", "war", "among"])
    found = CompressedContextPostprocessor(compressor, ratio=1.7, cache=PassageCache()).postprocess_nodes(nodes())
    shorter = found[0].node.llm_text
    (fragment,) = {"thirty war among", "thirty years war among", "thirty of war among"} & {
        shorter[shorter.index("thirty") : shorter.index("among") + 5]
    }
    response = recover_words(Response(f"It was the {fragment} the powers.", source_nodes=found))
    assert response.response == "It was the thirty years of war among the powers."
    assert recover_words(Response("Thirty years.", source_nodes=nodes())).response == "Thirty years."
    with pytest.raises(TypeError, match="finished Response"):
        recover_words(StreamingResponse(response_gen=iter(["a"])))
