"""`nutgraf demo`: index real passages, compress them once without training, ask ten questions in four ways; offline."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from llama_index.core import VectorStoreIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMCompletionEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import PrivateAttr
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from ...adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor, SentenceTransformerEmbedding
from ...adapters.store import MemoryStore, fill, keys_for
from ...compressors import Compressor, Reader, load_compressor
from ...recipes.data.corpus import Record, read_records
from ...recipes.data.templates import Piece, question_prompt
from ..loading import SAMPLE_QUESTIONS, find_reader
from ..metrics import exact_match, f1, recovered
from ..names import FIXED
from ..report.html import Example, write_report
from ..report.quality_tables import line_table
from ..report.table import rich_table
from ..rows import Row, clean, provenance
from ..speed.timing import first_token_times
from .expand import takes

MAX_NEW_TOKENS = 16
TOP_K = 2  # passages retrieved per question
INDEXED, MANY = 100, 10  # passages in the index, and in the longer prompt that is timed
FULL, NONE, SHORT = "full", "none", "truncate"


@dataclass(kw_only=True)
class DemoSettings:
    out: Annotated[Path, Option(help="Folder of the report.")] = Path("reports/demo")
    reader: Annotated[str, Option(help="A shipped reader, a folder or a hub id.")] = "reader-smollm2"
    questions: Annotated[int, Option(min=1, help="Questions to ask.")] = 10
    ratio: Annotated[float, Option(min=1, help="Compression ratio.")] = 4.0
    seed: Annotated[int, Option(help="Draws the questions.")] = 0


@takes(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Index real passages, compress them once without training, ask ten questions in four ways; offline, in minutes."""
    console = Console()
    console.rule("Load the reader")
    reader = find_reader(settings.reader, "cpu")
    run_demo(reader, load_compressor("kv-match", reader), read_records(SAMPLE_QUESTIONS), settings, console)


@dataclass
class Way:
    """A way to answer, with its answers: texts, positions read, and milliseconds to the first token."""

    name: str
    label: str
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)


class FirstTokens(BaseNodePostprocessor):
    """Cuts every passage to its first tokens: the plain shorter text of the same budget."""

    _reader: Any = PrivateAttr()
    _ratio: float = PrivateAttr()

    def __init__(self, reader: Reader, ratio: float) -> None:
        super().__init__()
        self._reader, self._ratio = reader, ratio

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        out = []
        for scored in nodes:
            text = scored.node.get_content()
            ends = [end for _, end in self._reader.tokenize_with_offsets(text)[1]]
            kept = text[: ends[math.ceil(len(ends) / self._ratio) - 1]] if ends else ""
            out.append(NodeWithScore(node=TextNode(text=kept, id_=scored.node.node_id), score=scored.score))
        return out


class _Costs(BaseEventHandler):
    """Notes the tokens and times of the LLM's answers."""

    way: Any

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMCompletionEndEvent):
            raw: Any = event.response.raw
            self.way.tokens.append(raw["reader_tokens"] - raw["source_tokens"] + raw["slots"])  # pairs, not their span
            self.way.ttft_ms.append(raw["ttft_ms"])


def run_demo(
    reader: Reader,
    compressor: Compressor,
    records: Sequence[Record],
    settings: DemoSettings,
    console: Console,
    *,
    embed_model: Any = None,
) -> Path:
    """Run the demo with a given reader, a compressor to keys and values, and questions; returns the report's path.

    Args:
        records: Some of their passages are indexed; questions of the half `report` are asked.
        embed_model: A LlamaIndex embedding; default all-MiniLM-L6-v2.
    """
    started = time.monotonic()
    millions = sum(p.numel() for p in reader.model.parameters()) / 1e6
    console.print(f"{reader.name}: {millions:.0f} million parameters, {str(reader.dtype).removeprefix('torch.')}.")
    asked = draw([record for record in records if record.half in (None, "report")], settings)

    console.rule("Index Wikipedia passages with LlamaIndex")
    index, n_passages = build_index([*asked, *records], embed_model or SentenceTransformerEmbedding(), console)
    retrieved = retrieve(index, asked)
    found = sum(record.gold is not None for record in retrieved)
    console.print(
        f"{n_passages} passages indexed; the right one is among the first {TOP_K} for {found} of {len(asked)} questions."
    )

    console.rule("Compress the retrieved passages once, before any question")
    store, texts = MemoryStore(), list(dict.fromkeys(text for record in retrieved for text in record.passages))
    begun = time.monotonic()
    with console.status(f"{compressor.config.method} reads {len(texts)} passages ..."):
        filled = fill(store, compressor, texts, ratio=settings.ratio)
    spent, nbytes = time.monotonic() - begun, store.stats.nbytes / len(texts)
    console.print(
        f"{filled.source_tokens:,} tokens of {len(texts)} passages became {filled.slots:,.0f} slots of {nbytes / 1e6:.2f} MB "
        f"a passage, in {spent:.0f} seconds."
    )

    console.rule("Ask through index.as_query_engine")
    ways = answer(index, reader, compressor, store, retrieved, settings, console)
    sizes = {FULL: sum(len(text.encode()) for text in texts) / len(texts), compressor.config.method: nbytes}
    rows = rows_of(ways, retrieved, sizes, filled.source_tokens / max(filled.slots, 1))
    rows = [clean(row | provenance(reader, settings.seed)) for row in rows]
    many = texts[:MANY]
    stored: Sequence[Any] = store.get_many(keys_for(compressor, many, ratio=settings.ratio))
    prompts: list[list[Piece]] = [question_prompt(pieces, asked[0].question) for pieces in (stored, many)]
    ours, theirs = first_token_times(reader, prompts[:1], reader, prompts[1:], requests=1, repeats=2)

    console.rule("Result")
    lead = headline(ways, settings.ratio)
    notes = [
        f"{found} of {len(asked)} questions, drawn at random, have the right passage among the {TOP_K} retrieved.",
        f"With {len(many)} passages in one prompt the first token comes after {ours:,.0f} ms instead of {theirs:,.0f} ms: "
        f"{sooner(theirs / ours)}.",
        f"Passages were compressed before any question was known, in {spent / len(texts):.1f} seconds each. Times are of "
        "compressed passages in memory.",
        "The time is saved by not reading the passages again; all keys and values precomputed (ratio 1) save most of it, too. "
        f"The ratio saves memory: {nbytes / 1e6:.2f} MB a passage, not some {settings.ratio * nbytes / 1e6:.1f} MB.",
    ]
    console.print(Text(lead, style="bold"))
    console.print(rich_table(line_table(rows, f"{len(asked)} questions, {TOP_K} retrieved passages each")))
    for note in notes:
        console.print(f"- {note}", highlight=False)
    examples = [
        Example(record.question, record.answers, {way.label: way.texts[i] for way in ways}, record.gold_text)
        for i, record in enumerate(retrieved)
    ]
    page = settings.out / "report.html"
    path = write_report(page, rows, title="nutgraf demo", lead=lead, examples=examples, notes=notes)
    console.print(
        f"\nReport: [bold]{path.resolve()}[/bold], after {time.monotonic() - started:.0f} seconds.", soft_wrap=True
    )
    return path


def draw(records: Sequence[Record], settings: DemoSettings) -> list[Record]:
    """Questions drawn at random, no two on the same passage while there are enough passages."""
    rng = random.Random(settings.seed)
    mixed = rng.sample(list(records), len(records))
    first: dict[tuple[str, ...], Record] = {}
    for record in mixed:
        first.setdefault(record.passages, record)
    apart = list(first.values())
    return (apart + [record for record in mixed if record not in apart])[: settings.questions]


def build_index(records: Sequence[Record], embed_model: Any, console: Console) -> tuple[VectorStoreIndex, int]:
    """A vector index over the first passages of the records, one node a passage, and how many there are."""
    passages = {text: title for record in records for text, title in zip(record.passages, record.titles)}
    hidden = ["title"]
    nodes = [
        TextNode(text=t, metadata={"title": name}, excluded_llm_metadata_keys=hidden)
        for t, name in list(passages.items())[:INDEXED]
    ]
    with console.status(f"Embedding {len(nodes)} passages ..."):
        return VectorStoreIndex(nodes, embed_model=embed_model), len(nodes)


def retrieve(index: VectorStoreIndex, records: Sequence[Record]) -> list[Record]:
    """The records with the passages that the index retrieves; `gold` is the index of the right one, if it is among them."""
    retriever = index.as_retriever(similarity_top_k=TOP_K)
    found = []
    for record in records:
        nodes = [scored.node for scored in retriever.retrieve(record.question)]
        texts = tuple(node.text for node in nodes)  # type: ignore[attr-defined]
        gold = texts.index(record.gold_text) if record.gold_text in texts else None
        titles = tuple(str(node.metadata.get("title", "")) for node in nodes)
        found.append(replace(record, passages=texts, titles=titles, gold=gold))
    return found


def answer(
    index: VectorStoreIndex,
    reader: Reader,
    compressor: Compressor,
    store: MemoryStore,
    records: Sequence[Record],
    settings: DemoSettings,
    console: Console,
) -> list[Way]:
    """Ask every question from full text, compressed passages, a shorter text and no context, in turns."""
    llm, method = CompressedContextLLM(reader, max_new_tokens=MAX_NEW_TOKENS, stop=["\n"]), compressor.config.method
    stored = CompressedContextPostprocessor(compressor, ratio=settings.ratio, store=store)

    def engine(*posts: BaseNodePostprocessor) -> Any:
        return index.as_query_engine(llm=llm, similarity_top_k=TOP_K, node_postprocessors=list(posts)).query

    asks: dict[str, tuple[Way, Any]] = {
        FULL: (Way(FULL, FIXED[FULL]), engine()),
        method: (Way(method, f"{method} {settings.ratio:g}x"), engine(stored)),
        SHORT: (Way(SHORT, "first tokens, as many"), engine(FirstTokens(reader, settings.ratio))),
        NONE: (Way(NONE, FIXED[NONE]), lambda question: llm.complete(f"Question: {question}\nAnswer:")),
    }
    for _, ask in asks.values():  # the first call of each is slower
        ask(records[0].question)
    for record in records:
        console.print(Text(record.question, style="bold"))
        table = Table(show_header=False, box=None)
        table.add_row("right answer", Text(record.answers[0]), style="dim")
        for way, ask in asks.values():
            costs = _Costs(way=way)
            get_dispatcher().add_event_handler(costs)
            try:
                said = str(ask(record.question)).strip()
            finally:
                get_dispatcher().event_handlers.remove(costs)
            way.texts.append(said)
            right = exact_match(said, record.answers) == 1
            table.add_row(way.label, Text(said or "(nothing)"), style="green" if right else None)
        console.print(table, "")
    return [way for way, _ in asks.values()]


def rows_of(ways: Sequence[Way], records: Sequence[Record], nbytes: dict[str, float], ratio: float) -> list[Row]:
    """One row of the quality suite for each way; `nbytes`: of a passage, as text and compressed."""
    scores = {way.name: [f1(text, r.answers) for text, r in zip(way.texts, records)] for way in ways}
    rows = []
    for way in ways:
        own = scores[way.name]
        row: Row = {
            "suite": "quality",
            "dataset": "demo",
            "method": way.name,
            "n": len(records),
            "em": statistics.mean(exact_match(text, r.answers) for text, r in zip(way.texts, records)),
            "f1": statistics.mean(own),
            "ratio": {FULL: 1.0, NONE: None}.get(way.name, ratio),
            "reader_tokens": statistics.mean(way.tokens),
            "ttft_ms": statistics.median(way.ttft_ms),
            "bytes_per_passage": nbytes.get(way.name, nbytes[FULL] / ratio if way.name == SHORT else None),
            "interface": "text" if way.name in (FULL, NONE, SHORT) else "kv",
            **({"budget_of": ways[1].name} if way.name == SHORT else {}),
        }
        if way.name not in (FULL, NONE):
            row |= recovered(*(np.array(scores[name]) for name in (way.name, NONE, FULL)))
        rows.append(row)
    return rows


def headline(ways: Sequence[Way], ratio: float) -> str:
    """The result in a sentence: answers as the full text's, what is kept, and how much sooner the first token comes."""
    full, ours = ways[0], ways[1]
    same = sum(exact_match(a, [b]) == 1 for a, b in zip(ours.texts, full.texts))
    faster = statistics.median(full.ttft_ms) / statistics.median(ours.ttft_ms)
    part = {2.0: "half", 3.0: "a third", 4.0: "a quarter"}.get(float(ratio), f"1/{ratio:g}")
    return (
        f"{ours.name} answered {same} of {len(full.texts)} questions as the full text does, from {part} of the keys and "
        f"values, and gave the first token {sooner(faster)}."
    )


def sooner(times: float) -> str:
    """A speedup in words."""
    return (
        f"{times:.1f} times sooner" if times >= 1.05 else "as soon" if times > 0.95 else f"{1 / times:.1f} times later"
    )
