"""The pipelines of `rag_before.py` and `rag_after.py` side by side: answers, tokens that the reader read, time to first token.

The third pipeline is that of `rag_after.py` with its passages compressed while they are indexed: asking no longer pays for
that. Run it with ``python examples/rag_compare.py``.
"""

import time

import rag_before
from llama_index.core import VectorStoreIndex
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressPassages,
    PassageCache,
)
from nutgraf.adapters.store import MemoryStore
from rag_after import compressor, pipeline, reader
from shared import ask, embedding, passages, questions, show


def indexed_pipeline():
    """The pipeline over passages that are compressed now, once, for all questions to come."""
    store = MemoryStore()  # a LanceStore keeps them: ingest_lancedb.py
    index = VectorStoreIndex(CompressPassages(compressor, store)(passages()), embed_model=embedding())
    return index.as_query_engine(
        similarity_top_k=2,
        llm=CompressedContextLLM(reader, max_new_tokens=16),
        node_postprocessors=[CompressedContextPostprocessor(compressor, store=store, cache=PassageCache())],
    )


def warm_up(text_pipeline):
    """What is slower when it is done for the first time in a process."""
    text_pipeline.query("Is everything warm?")
    slots = compressor.compress(["Is everything warm?"])
    list(reader.stream([*slots, "Yes"], max_new_tokens=4))


def tokens_and_ms(answers):
    """The mean over the questions."""
    return [sum(getattr(a, name) for a in answers) / len(answers) for name in ("reader_tokens", "ttft_ms")]


if __name__ == "__main__":
    before, after = rag_before.pipeline(), pipeline()
    warm_up(before)
    start = time.perf_counter()
    indexed = indexed_pipeline()
    print(f"{len(passages())} passages embedded and compressed in {time.perf_counter() - start:.1f} s.")
    columns = {
        "as text": ask(before, questions()),
        "compressed when asked": ask(after, questions()),
        "compressed when indexed": ask(indexed, questions()),
    }
    show(questions(), **columns)
    tokens, ms = tokens_and_ms(columns["as text"])
    for name, answers in columns.items():
        read, first = tokens_and_ms(answers)
        print(
            f"{name:24} {read:5.0f} tokens read ({1 - read / tokens:4.0%} saved), first token after {first:5.0f} ms "
            f"({1 - first / ms:4.0%} saved)"
        )
