"""Compression at indexing time: LlamaIndex's ingestion, and what a query then no longer does."""

from __future__ import annotations

import logging
import pickle

import pytest
from fakes import Fixed
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressPassages,
    PassageCache,
    PassagesStoredEvent,
    StoreRetriever,
)
from nutgraf.adapters.store import LanceStore, MemoryStore, fill, keys_for
from nutgraf.adapters.store.upkeep import forget
from texts import DELEGATES, QUESTION

TEXTS = DELEGATES


class WordEmbedding(MockEmbedding):
    """One dimension for each delegate."""

    def _vector(self, text: str) -> list[float]:
        return [float(str(1600 + i) in text) + 0.01 for i in range(self.embed_dim)]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._vector(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._vector(query)


@pytest.fixture(params=["memory", "lance"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else LanceStore(tmp_path / "store")


def nodes() -> list[TextNode]:
    return [TextNode(id_=f"n{i}", text=text, metadata={"page": i}) for i, text in enumerate(TEXTS)]


def ask(engine_nodes, reader, compressor, store, **kwargs):
    """What a query engine answers over the nodes, with the postprocessor on the store."""
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    post = CompressedContextPostprocessor(compressor, store=store, cache=PassageCache(), **kwargs)
    index = VectorStoreIndex(engine_nodes, embed_model=MockEmbedding(4))
    return index.as_query_engine(llm=llm, node_postprocessors=[post], similarity_top_k=9).query(QUESTION)


@pytest.mark.slow
def test_ingested_nodes_are_not_compressed_at_query_time(reader, store):
    compressor = Fixed(reader)
    before = [node.model_dump() for node in nodes()]
    out = IngestionPipeline(transformations=[CompressPassages(compressor, store, batch_size=2)]).run(nodes=nodes())
    assert [node.model_dump() for node in out] == before  # nothing of ours travels with the nodes
    assert compressor.asked == TEXTS
    online = str(ask(nodes(), reader, Fixed(reader), None))
    answer = ask(out, reader, compressor, store)
    assert str(answer) == online
    assert compressor.asked == TEXTS  # nothing more
    assert sorted(node.node.text for node in answer.source_nodes) == TEXTS


def test_a_query_never_touches_the_text_of_what_is_stored(reader, store, monkeypatch):
    """So the time to the first token depends on the number of slots alone, not on the passages' length."""
    compressor = Fixed(reader)
    short, long = TEXTS[0], " ".join([TEXTS[1]] * 60)
    CompressPassages(compressor, store)([TextNode(text=short), TextNode(text=long)])
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    tokenised: list[str] = []
    backend = type(reader.prompts)
    for name in ("encode_batch", "tokenize"):
        if hasattr(backend, name):
            run = getattr(backend, name)
            monkeypatch.setattr(
                backend, name, lambda self, x, *a, _run=run, **k: (tokenised.append(str(x)), _run(self, x, *a, **k))[1]
            )
    compressor.asked.clear()
    sizes = []
    for text in (short, long):
        post = CompressedContextPostprocessor(compressor, store=store, cache=PassageCache())
        (out,) = post.postprocess_nodes([NodeWithScore(node=TextNode(text=text))])
        sizes.append(
            llm.complete(out.node.get_content(MetadataMode.LLM) + "\nQuestion: who?\nAnswer:").raw["reader_tokens"]
        )
    assert sizes[0] == sizes[1]
    assert compressor.asked == []
    assert tokenised
    assert not any("treaty" in text for text in tokenised)


def test_an_ingestion_that_was_stopped_goes_on_where_it_was(reader, tmp_path):
    compressor = Fixed(reader)
    compressor.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        CompressPassages(compressor, LanceStore(tmp_path / "s"), batch_size=2)(nodes())
    assert compressor.asked == TEXTS[:2]
    again = Fixed(reader)
    CompressPassages(again, LanceStore(tmp_path / "s"), batch_size=2)([*nodes(), TextNode(text=TEXTS[4])])
    assert again.asked == TEXTS[2:]
    CompressPassages(again, LanceStore(tmp_path / "s"))(nodes())
    assert again.asked == TEXTS[2:]


def test_a_changed_compressor_is_noticed_and_never_mixed(reader, store, caplog):
    CompressPassages(Fixed(reader), store)(nodes())
    changed = Fixed(reader, slots=2)
    with caplog.at_level(logging.WARNING):
        ask(nodes(), reader, changed, store)
        ask(nodes(), reader, changed, store)
    assert sorted(changed.asked) == TEXTS  # compressed once, and stored beside the others
    (warning,) = [record.getMessage() for record in caplog.records if "query time" in record.getMessage()]
    assert "another compressor" in warning
    slots = {made.maker.compressor: made.slots / made.passages for made in store.stats.makers}
    assert slots == {Fixed(reader).fingerprint: 4, changed.fingerprint: 2}


def test_a_pipelines_own_cache_hides_no_change(reader, tmp_path):
    """LlamaIndex skips a transformation that it has seen with the same nodes; another store or compressor is another one."""
    pipeline = IngestionPipeline(transformations=[CompressPassages(Fixed(reader), LanceStore(tmp_path / "one"))])
    pipeline.run(nodes=nodes())
    for compressor, folder in ((Fixed(reader), "two"), (Fixed(reader, slots=2), "one")):
        store = LanceStore(tmp_path / folder)
        again = IngestionPipeline(transformations=[CompressPassages(compressor, store)], cache=pipeline.cache)
        again.run(nodes=nodes())
        assert store.missing(keys_for(compressor, TEXTS)) == []
    CompressPassages(compressor, store).to_dict()


def test_images_and_nodes_without_text(reader, store):
    compressor = Fixed(reader)
    given = [ImageNode(text="a picture", image_path="x.png"), TextNode(text=""), TextNode(text=TEXTS[0])]
    assert CompressPassages(compressor, store)(given) == given
    assert compressor.asked == ["", TEXTS[0]]
    ask(given[1:], reader, compressor, store)
    assert compressor.asked == ["", TEXTS[0]]


@pytest.mark.slow
async def test_async_ingestion_with_a_splitter_and_events(reader, store, events):
    steps = [SentenceSplitter(chunk_size=40, chunk_overlap=0), CompressPassages(Fixed(reader), store)]
    out = await IngestionPipeline(transformations=steps).arun(documents=[Document(text=". ".join(TEXTS))])
    (event,) = (e for e in events if isinstance(e, PassagesStoredEvent))
    assert (event.found, event.compressed) == (0, len(out))
    assert event.slots == 4 * len(out)
    assert event.source_tokens > event.slots


def test_one_table_serves_retrieval_and_reading(reader, tmp_path):
    store, compressor, embedder = LanceStore(tmp_path / "s"), Fixed(reader), WordEmbedding(embed_dim=5)
    IngestionPipeline(transformations=[embedder, CompressPassages(compressor, store)]).run(nodes=nodes())
    compressor.asked.clear()
    llm = CompressedContextLLM(reader, max_new_tokens=2)
    engine = RetrieverQueryEngine.from_args(
        StoreRetriever(store, embedder, compressor, similarity_top_k=1),
        llm=llm,
        node_postprocessors=[CompressedContextPostprocessor(compressor, store=store, cache=PassageCache())],
    )
    answer = engine.query("What did 1603 see?")
    (found,) = answer.source_nodes
    assert (found.node.text, found.node.metadata, found.node.node_id) == (TEXTS[3], {"page": 3}, "n3")
    assert found.score == pytest.approx(1.0, abs=0.01)
    assert compressor.asked == []


@pytest.mark.parametrize("before", ["fill", "query"])
def test_passages_stored_without_a_vector_are_retrieved_after_an_ingestion(reader, tmp_path, before):
    store, compressor, embedder = LanceStore(tmp_path / "s"), Fixed(reader), WordEmbedding(embed_dim=5)
    if before == "fill":
        fill(store, compressor, TEXTS)
    else:
        ask(nodes(), reader, compressor, store)
    documents = [Document(text=text, id_=f"d{i}", metadata={"page": i}) for i, text in enumerate(TEXTS)]
    steps = [SentenceSplitter(chunk_size=200), embedder, CompressPassages(compressor, store)]
    IngestionPipeline(transformations=steps).run(documents=documents)
    assert sorted(compressor.asked) == TEXTS
    (found,) = StoreRetriever(store, embedder, compressor, similarity_top_k=1).retrieve("What did 1603 see?")
    assert (found.node.text, found.node.metadata, found.node.ref_doc_id) == (TEXTS[3], {"page": 3}, "d3")
    documents[3] = Document(text=TEXTS[3], id_="new", metadata={"page": 9})
    IngestionPipeline(transformations=steps).run(documents=documents)
    (found,) = StoreRetriever(store, embedder, compressor, similarity_top_k=1).retrieve("What did 1603 see?")
    assert (found.node.metadata, found.node.ref_doc_id) == ({"page": 9}, "new")
    assert forget(store, ref_doc_id="new") == 1
    (found,) = StoreRetriever(store, embedder, compressor, similarity_top_k=1).retrieve("What did 1603 see?")
    assert found.node.ref_doc_id != "new"


def test_a_text_of_two_documents_is_retrieved_for_both(reader, tmp_path):
    store = LanceStore(tmp_path / "store")
    compressor = Fixed(reader)
    embedder = MockEmbedding(4)
    documents = [Document(text=DELEGATES[0], id_=name, metadata={"name": name}) for name in ("one", "two")]
    for document in documents:
        steps = [SentenceSplitter(), embedder, CompressPassages(compressor, store)]
        IngestionPipeline(transformations=steps).run(documents=[document])
    assert store.stats.passages == 1
    for held in (("two", "one"), ("two",), ()):
        found = StoreRetriever(store, embedder, compressor, similarity_top_k=5).retrieve("Who signed?")
        assert tuple(node.node.metadata["name"] for node in found) == held
        assert tuple(node.node.ref_doc_id for node in found) == held
        if held:
            assert forget(store, ref_doc_id=held[-1]) == 1


def test_a_store_that_cannot_be_written_costs_no_answer(reader, tmp_path, caplog):
    compressor = Fixed(reader)
    LanceStore(tmp_path / "s").put_many([])
    assert str(ask(nodes(), reader, compressor, LanceStore(tmp_path / "s", read_only=True)))
    assert sorted(compressor.asked) == TEXTS
    assert LanceStore(tmp_path / "s").stats.passages == 0


def test_bad_use_is_told(reader, tmp_path):
    with pytest.raises(TypeError, match="nutgraf compressor"):
        CompressPassages(object(), MemoryStore())
    with pytest.raises(TypeError, match="PassageStore"):
        CompressPassages(Fixed(reader), {})
    with pytest.raises(TypeError, match="LanceStore"):
        StoreRetriever(MemoryStore(), MockEmbedding(4))
    with pytest.raises(TypeError, match="num_workers=None"):
        pickle.dumps(CompressPassages(Fixed(reader), MemoryStore()))
    asking = Fixed(reader)
    asking.query_aware = True
    with pytest.raises(ValueError, match="compresses for a question"):
        CompressPassages(asking, MemoryStore())


def test_documents_without_an_id_are_retrieved_once_however_often_they_are_ingested(reader, tmp_path):
    store, compressor, embedder = LanceStore(tmp_path / "store"), Fixed(reader), MockEmbedding(4)
    ids = set()
    for _ in range(3):
        steps = [SentenceSplitter(), embedder, CompressPassages(compressor, store)]
        IngestionPipeline(transformations=steps).run(documents=[Document(text=DELEGATES[0])])
        (found,) = StoreRetriever(store, embedder, compressor, similarity_top_k=5).retrieve("Who signed?")
        ids.add(found.node.ref_doc_id)
    assert len(ids) == 3  # each time the newest
    assert forget(store, ref_doc_id=found.node.ref_doc_id) == 1
