"""The pipeline of `rag_before.py` with compressed passages; two lines differ.

Run it with ``python examples/rag_after.py``.
"""

from llama_index.core import VectorStoreIndex
from nutgraf import Reader, load_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor
from shared import READER, ask, embedding, passages, questions, show

reader = Reader.from_pretrained(READER)
compressor = load_compressor("kv-match", reader)


def pipeline():
    index = VectorStoreIndex(passages(), embed_model=embedding())
    return index.as_query_engine(
        similarity_top_k=2,
        llm=CompressedContextLLM(reader, max_new_tokens=16),
        node_postprocessors=[CompressedContextPostprocessor(compressor)],
    )


if __name__ == "__main__":
    show(questions(), compressed=ask(pipeline(), questions()))
