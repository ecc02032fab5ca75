"""KV matching behind the adapters: ragged keys and values in LlamaIndex and a store; a serving engine refuses them."""

from __future__ import annotations

import json

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from nutgraf import load_compressor
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressPassages,
    PassageCache,
)
from nutgraf.adapters.openai.embeddings import EmbeddingTable
from nutgraf.adapters.store import LanceStore
from nutgraf.cli import app
from typer.testing import CliRunner

TEXTS = [
    f"In {1600 + i} delegate number {i} signed the treaty of Westphalia, said John {name}."
    for i, name in enumerate("AB")
]
QUESTION = "Who signed it?"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"quantize": "int8"}])
def test_compressed_when_indexed_and_read_from_the_store(zoo, tmp_path, settings):
    reader = zoo.reader("llama", num_hidden_layers=2)
    compressor = load_compressor("kv-match", reader=reader, probes=4)
    store = LanceStore(tmp_path / "store", **settings)
    nodes = IngestionPipeline(transformations=[CompressPassages(compressor, store)]).run(
        nodes=[TextNode(text=text) for text in TEXTS]
    )
    made = compressor.compress(TEXTS)
    stats = store.stats
    assert stats.passages == 2
    assert stats.nbytes < sum(passage.nbytes for passage in made) * (1.3 if not settings else 0.6)
    answers = []
    for kept in (store, None):
        post = CompressedContextPostprocessor(compressor, store=kept, cache=PassageCache())
        index = VectorStoreIndex(nodes, embed_model=MockEmbedding(4))
        engine = index.as_query_engine(llm=CompressedContextLLM(reader, max_new_tokens=4), node_postprocessors=[post])
        answers.append(str(engine.query(QUESTION)))
    assert answers[0]
    if not settings:
        assert answers[0] == answers[1]


def test_a_serving_engine_refuses_them_with_a_sentence(zoo):
    reader = zoo.reader("llama")
    (passage,) = load_compressor("kv-match", reader=reader, probes=2).compress(TEXTS[:1])
    with pytest.raises(ValueError, match="keys and values cannot be sent"):
        EmbeddingTable.of(reader).plan([[passage, QUESTION]])


@pytest.mark.slow
def test_the_commands_take_it_by_its_name(zoo, tmp_path):
    folder = str(zoo.saved("llama", tmp_path / "reader"))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    files = [str(tmp_path / "corpus.jsonl"), "--store", str(tmp_path / "s"), "--quantize", "int8"]
    done = CliRunner().invoke(app, ["compress", *files, "-c", "kv-match", "--reader", folder])
    assert done.exit_code == 0, done.output
    assert "2 passages compressed" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["inspect", TEXTS[0], "-c", "kv-match", "--reader", folder, "--query", QUESTION])
    assert done.exit_code == 0, done.output
    assert "pairs per head" in done.output
    assert "Tokens whose keys and values most heads keep" in done.output
    with pytest.raises(ValueError, match="There is no compressor 'kv-matched'"):
        load_compressor("kv-matched", reader=zoo.reader("llama"))
