"""Nodes are reranked by their compressed passages."""

from __future__ import annotations

import pytest
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from nutgraf import make_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor, CompressedReranker
from nutgraf.adapters.store import MemoryStore
from nutgraf.compressors.reader.ranking import nearest_passages, rank_passages
from texts import CURIE, NUT_GRAF, RIVERS, TREATY

TEXTS = [TREATY, " ", RIVERS, CURIE, NUT_GRAF]
ASKED = QueryBundle("who signed it?")


@pytest.fixture(scope="module")
def compressor(reader):
    return make_compressor("icae", reader, mem_size=16, ratio=4).eval()


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=1 - 0.1 * i) for i, text in enumerate(TEXTS)]


def test_nodes_come_in_the_order_of_their_passages(compressor):
    given = [NodeWithScore(node=ImageNode(image_url="file:x"), score=2.0), *nodes()]
    found = CompressedReranker(compressor).postprocess_nodes(given, ASKED)
    full = [0, 2, 3, 4]
    order = rank_passages(compressor.reader, ASKED.query_str, compressor.compress([TEXTS[i] for i in full]))
    assert [scored.node.node_id for scored in found[:4]] == [str(full[i]) for i in order]
    assert {scored.node.node_id for scored in found[4:]} == {"1", given[0].node.node_id}
    scores = {scored.node.node_id: scored.score for scored in given}
    assert all(scored.score == scores[scored.node.node_id] for scored in found)
    assert CompressedReranker(compressor, top_n=2).postprocess_nodes(given, ASKED) == found[:2]
    assert CompressedReranker(compressor).postprocess_nodes([], ASKED) == []


def test_nodes_come_in_the_order_of_mean_slots(compressor):
    found = CompressedReranker(compressor, by="slots").postprocess_nodes(nodes(), ASKED)
    asked, *passages = compressor.compress([ASKED.query_str, *(TEXTS[i] for i in (0, 2, 3, 4))])
    assert [scored.node.node_id for scored in found] == [
        *("0234"[i] for i in nearest_passages(asked, passages)),
        "1",
    ]
    assert [
        n.node.node_id for n in CompressedReranker(compressor, by="slots").postprocess_nodes(nodes(), QueryBundle(" "))
    ]
    with pytest.raises(ValueError, match="by"):
        CompressedReranker(compressor, by="cosine")


def test_stored_passages_are_not_compressed_again(compressor, monkeypatch):
    store = MemoryStore()
    reranker = CompressedReranker(compressor, store=store)
    found = reranker.postprocess_nodes(nodes(), ASKED)
    monkeypatch.setattr(compressor, "encode", lambda *a: pytest.fail("compressed again"))
    assert CompressedReranker(compressor, store=store).postprocess_nodes(nodes(), ASKED) == found


@pytest.mark.slow
def test_it_works_in_front_of_the_postprocessor(compressor, make_index, reader):
    index = make_index([text for text in TEXTS if text.strip()])
    post = [CompressedReranker(compressor, top_n=2), CompressedContextPostprocessor(compressor)]
    engine = index.as_query_engine(
        llm=CompressedContextLLM(reader, max_new_tokens=2), similarity_top_k=4, node_postprocessors=post
    )
    assert len(engine.query("who signed it?").source_nodes) == 2


def test_what_it_cannot_rank_is_refused(compressor, reader):
    with pytest.raises(ValueError, match="none; pass query_bundle"):
        CompressedReranker(compressor).postprocess_nodes(nodes())
    with pytest.raises(ValueError, match="gives text"):
        CompressedReranker(make_compressor("selective-context", reader))
    with pytest.raises(ValueError, match="reads questions"):
        CompressedReranker(make_compressor("icae", reader, query_aware=True))
    with pytest.raises(ValueError, match="stride"):
        CompressedReranker(compressor, window=4, stride=5)
    with pytest.raises(TypeError, match="ompressor"):
        CompressedReranker("icae")
