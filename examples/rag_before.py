"""A LlamaIndex pipeline whose LLM reads the retrieved passages as text. `rag_after.py` is the same, compressed.

Run it with ``python examples/rag_before.py``.
"""

from llama_index.core import VectorStoreIndex
from shared import READER, TransformersLLM, ask, embedding, passages, questions, show


def pipeline():
    index = VectorStoreIndex(passages(), embed_model=embedding())
    return index.as_query_engine(
        similarity_top_k=2,
        llm=TransformersLLM(name=READER),
    )


if __name__ == "__main__":
    show(questions(), text=ask(pipeline(), questions()))
