"""Haystack, end to end: a pipeline compresses documents, builds a prompt of them and reads it."""

from __future__ import annotations

import inspect
import os

import pytest
from nutgraf import make_compressor
from nutgraf.adapters.placeholders.placeholder import MARKER
from texts import CURIE, QUESTION, TREATY

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
haystack = pytest.importorskip("haystack")
from haystack.components.builders import PromptBuilder  # noqa: E402
from nutgraf.adapters.haystack import CompressedContextDocuments, CompressedContextGenerator, register  # noqa: E402

TEXTS = [TREATY, CURIE]
ALLOWED = {}
if "allowed_modules" in inspect.signature(haystack.Pipeline.loads).parameters:
    ALLOWED = {"allowed_modules": ["nutgraf.adapters.haystack"]}
TEMPLATE = "{% for d in documents %}{{ d.content }}\n{% endfor %}Question: {{ query }}\nAnswer:"


@pytest.fixture
def documents():
    return [haystack.Document(content=text, meta={"n": i}, score=0.5) for i, text in enumerate(TEXTS)]


def test_a_pipeline_reads_compressed_passages(reader, documents):
    compressor = make_compressor("mean-pool", reader, encoder="embeddings")
    pipeline = haystack.Pipeline()
    pipeline.add_component("compress", CompressedContextDocuments(compressor, ratio=4))
    pipeline.add_component("prompt", PromptBuilder(TEMPLATE, required_variables="*"))
    pipeline.add_component("read", CompressedContextGenerator(reader, max_new_tokens=12))
    pipeline.connect("compress.documents", "prompt.documents")
    pipeline.connect("prompt.prompt", "read.prompt")
    asked = {"compress": {"documents": documents, "query": QUESTION}, "prompt": {"query": QUESTION}}
    first, second = compressor.compress(TEXTS, ratio=4)
    wanted = reader.generate([[first, "\n", second, f"\nQuestion: {QUESTION}\nAnswer:"]], 12)
    assert wanted != reader.generate(["\n".join([*TEXTS, f"Question: {QUESTION}\nAnswer:"])], 12)
    assert pipeline.run(asked)["read"]["replies"] == wanted
    assert [d.content for d in documents] == TEXTS
    again = haystack.Pipeline.loads(pipeline.dumps(), **ALLOWED)
    assert again.dumps() == pipeline.dumps()
    assert again.run(asked)["read"]["replies"] == wanted


def test_a_saved_pipeline_names_the_models_that_it_needs(reader, zoo):
    saved = CompressedContextGenerator(reader, 5, stop=["x"]).to_dict()
    assert saved["init_parameters"] | {"reader": ""} == {"reader": "", "max_new_tokens": 5, "stop": ["x"]}
    other = zoo.reader("llama", seed=5, num_hidden_layers=1)
    saved["init_parameters"]["reader"] = f"reader {other.fingerprint}"
    with pytest.raises(haystack.DeserializationError, match=other.fingerprint):
        CompressedContextGenerator.from_dict(saved)
    register(other)
    assert CompressedContextGenerator.from_dict(saved).run("Hi") == {"replies": other.generate(["Hi"], 5, stop="x")}


def test_documents_keep_who_they_are(reader, documents):
    compressor = make_compressor("selective-context", reader)
    empty = haystack.Document(content=None, meta={"n": 2})
    found = CompressedContextDocuments(compressor, ratio=2).run([*documents, empty], QUESTION)["documents"]
    assert [d.id for d in found] == [d.id for d in [*documents, empty]]
    assert [d.meta["n"] for d in found] == [0, 1, 2]
    assert found[2] is empty
    for document, text in zip(found, TEXTS):
        assert document.meta["original_text"] == text
        assert document.score == 0.5
        assert 0 < len(document.content) < len(text)
        assert MARKER not in document.content


@pytest.mark.parametrize("method", ["mean-pool", "selective-context"])
def test_a_document_that_passes_twice_is_read_as_once(reader, documents, method):
    compress = CompressedContextDocuments(make_compressor(method, reader), ratio=2)
    documents[1].meta["original_text"] = "in French"
    once = compress.run(documents, QUESTION)["documents"]
    twice = compress.run(once, QUESTION)["documents"]
    read = CompressedContextGenerator(reader, max_new_tokens=6)
    for first, second in zip(once, twice):
        assert read.run(f"{second.content}\n{QUESTION}") == read.run(f"{first.content}\n{QUESTION}")
        assert second.meta == first.meta
    assert [once[0].meta["original_text"], once[1].meta["original_text"]] == [TEXTS[0], "in French"]
    assert once[1].meta["nutgraf_original_text"] == TEXTS[1]


def test_a_budget_in_tokens(reader, documents):
    compress = CompressedContextDocuments(make_compressor("selective-context", reader), max_tokens=9)
    again = CompressedContextDocuments.from_dict(compress.to_dict())
    for document in [*compress.run(documents)["documents"], *again.run(documents)["documents"]]:
        assert 6 <= len(reader.tokenize(document.content)) <= 9


def test_bad_arguments():
    with pytest.raises(TypeError, match="nutgraf compressor"):
        CompressedContextDocuments("icae")
    with pytest.raises(TypeError, match="nutgraf Reader"):
        CompressedContextGenerator("gpt-4")
