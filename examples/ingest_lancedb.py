"""Compress passages once, at indexing time; answer from the store.

    pip install nutgraf[store]
    python examples/ingest_lancedb.py [FOLDER]

Run it twice: the second time nothing is compressed. One LanceDB table holds texts, retrieval vectors and keys and
values, in eight bits.
"""

from __future__ import annotations

import sys
import time

from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from nutgraf import Reader, load_compressor
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressPassages,
    SentenceTransformerEmbedding,
    StoreRetriever,
)
from nutgraf.adapters.store import LanceStore
from shared import READER

ARTICLES = [
    "The Peace of Westphalia was signed in 1648 in Osnabrueck and Muenster. It ended the Thirty Years' War.",
    "Marie Curie was born in Warsaw in 1867. She won Nobel Prizes in physics and in chemistry.",
    "The Amazon carries more water than any other river. It rises in the Andes and flows into the Atlantic.",
]
QUESTION = "Where was Marie Curie born?"


def main(folder: str = "passages") -> None:
    """Ingest three short articles into the store in ``folder`` and ask a question."""
    reader = Reader.from_pretrained(READER)
    compressor = load_compressor("kv-match", reader)
    embedder = SentenceTransformerEmbedding()
    store = LanceStore(folder, quantize="int8")

    # Indexing: split, embed, compress. Stop it at any time and run it again; stored passages are skipped.
    start = time.perf_counter()
    before = store.stats.passages
    IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=256), embedder, CompressPassages(compressor, store)]
    ).run(documents=[Document(text=text) for text in ARTICLES])
    stats = store.stats
    print(
        f"{stats.passages - before} passages compressed in {time.perf_counter() - start:.1f} s, {before} were stored."
    )
    print(f"{stats.makers[0].ratio:.1f} tokens per slot, {stats.nbytes:,} bytes of keys and values in {folder}.")

    # Answering: retrieval and slots come from the same table, and nothing is compressed.
    engine = RetrieverQueryEngine.from_args(
        StoreRetriever(store, embedder, compressor, similarity_top_k=2),
        llm=CompressedContextLLM(reader, max_new_tokens=16),
        node_postprocessors=[CompressedContextPostprocessor(compressor, store=store)],
    )
    answer = engine.query(QUESTION)
    print(f"{QUESTION} {answer}")
    for source in answer.source_nodes:
        print(f"  {source.score:.2f} {source.node.get_content()}")
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
