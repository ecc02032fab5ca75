"""Compare `rag_before.py` and `rag_after.py`: answers, tokens read, time to first token.

A third pipeline compresses its passages at indexing time, so the time to the first token depends only on the number of
slots. The second table shows this: longer passages are compressed to the same number of slots. Run it with
``python examples/rag_compare.py``; on two CPU cores it takes some minutes.
"""

import statistics
import time

import rag_before
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressPassages,
    PassageCache,
)
from nutgraf.adapters.store import MemoryStore
from rag_after import compressor, pipeline, reader
from rich.console import Console
from rich.table import Table
from shared import READER, TransformersLLM, ask, embedding, passages, questions, show

RATIO = 4  # tokens a slot, the compressor's own


def indexed_pipeline(nodes, ratio=RATIO):
    """Build the pipeline over passages compressed now, once for all questions."""
    store = MemoryStore()  # a LanceStore keeps them: ingest_lancedb.py
    index = VectorStoreIndex(CompressPassages(compressor, store, ratio=ratio)(nodes), embed_model=embedding())
    return index.as_query_engine(
        similarity_top_k=2,
        llm=CompressedContextLLM(reader, max_new_tokens=16),
        node_postprocessors=[
            CompressedContextPostprocessor(compressor, ratio=ratio, store=store, cache=PassageCache())
        ],
    )


def longer_passages(times):
    """Join every third passage with the following ones to this many times its length."""
    texts = [node.text for node in passages()]
    return [TextNode(text="\n".join((texts * 2)[i : i + times])) for i in range(0, len(texts), 3)]


def warm_up(text_pipeline):
    """Run everything once, because first calls are slower."""
    text_pipeline.query("Is everything warm?")
    slots = compressor.compress(["Is everything warm?"])
    list(reader.stream([*slots, "Yes"], max_new_tokens=4))


def mean_tokens_and_median_ms(answers):
    """Statistics over the questions."""
    return statistics.mean(a.reader_tokens for a in answers), statistics.median(a.ttft_ms for a in answers)


def compare_pipelines():
    """Ask the same questions with and without compression."""
    before, after = rag_before.pipeline(), pipeline()
    warm_up(before)
    start = time.perf_counter()
    indexed = indexed_pipeline(passages())
    print(f"{len(passages())} passages embedded and compressed in {time.perf_counter() - start:.1f} s.")
    columns = {
        "as text": ask(before, questions()),
        "compressed when asked": ask(after, questions()),
        "compressed when indexed": ask(indexed, questions()),
    }
    show(questions(), **columns)
    tokens, ms = mean_tokens_and_median_ms(columns["as text"])
    for name, answers in columns.items():
        read, first = mean_tokens_and_median_ms(answers)
        saved = "" if name == "as text" else f" ({1 - read / tokens:.0%} fewer)"
        faster = "" if name == "as text" else f" ({ms / first:.1f} times as fast)"
        print(f"{name:24}{read:5.0f} tokens read{saved}, first token after {first:.0f} ms{faster}")


def compare_lengths():
    """Read longer passages as text and in the same number of slots."""
    table = Table("passages", "tokens read as text", "first token", "tokens read compressed", "first token")
    text_llm = TransformersLLM(name=READER)
    for times in (1, 2):
        nodes = longer_passages(times)
        text = VectorStoreIndex(nodes, embed_model=embedding()).as_query_engine(similarity_top_k=2, llm=text_llm)
        row = [f"{times} x as long, ratio {RATIO * times}"]
        for engine in (text, indexed_pipeline(nodes, RATIO * times)):
            tokens, ms = mean_tokens_and_median_ms(ask(engine, questions()))
            row += [f"{tokens:.0f}", f"{ms:.0f} ms"]
        table.add_row(*row)
    print("\nCompressed when indexed, longer passages cost no more to read:")
    Console().print(table)


if __name__ == "__main__":
    compare_pipelines()
    compare_lengths()
