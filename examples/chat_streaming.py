"""A chat engine that reads retrieved passages compressed and streams its answers.

Run it with ``python examples/chat_streaming.py``.
"""

from llama_index.core import VectorStoreIndex
from nutgraf import Reader, load_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor
from shared import READER, embedding, passages, questions

reader = Reader.from_pretrained(READER)
compressor = load_compressor("kv-match", reader)


def chat_engine():
    index = VectorStoreIndex(passages(), embed_model=embedding())
    return index.as_chat_engine(
        chat_mode="context",
        similarity_top_k=2,
        llm=CompressedContextLLM(reader, max_new_tokens=24, stop=["\n"]),
        node_postprocessors=[CompressedContextPostprocessor(compressor)],
    )


if __name__ == "__main__":
    engine = chat_engine()
    for question in questions()[:3]:
        print(f"> {question}")
        response = engine.stream_chat(question)
        for piece in response.response_gen:
            print(piece, end="", flush=True)
        print(
            f"\n  ({len(response.source_nodes)} sources, the first: {response.source_nodes[0].node.get_content()[:60]}...)"
        )
