"""`nutgraf demo`: index, ask with and without compression, measure, train a little, report; offline, in a few minutes."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from ...adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor, SentenceTransformerEmbedding
from ...compressors import Reader, load_compressor
from ...recipes.data.corpus import Record, read_records
from ..loading import (
    SAMPLE,
    SAMPLE_ARTICLES,
    SAMPLE_QUESTIONS,
    CompressorSpec,
    find_reader,
)
from ..methods import Compressed, lines
from ..metrics import exact_match
from ..quality.quality import Settings, evaluate
from ..report.html import Example, write_report
from ..report.plots import require_matplotlib
from ..report.quality_tables import line_table
from ..report.table import rich_table
from ..speed.entrants import Entrant
from ..speed.speed import speed
from .expand import takes

COMPRESSORS = ("salient-pool-small@4", "mean-pool-small@4", "xrag-small", "selective-context@2")
MAX_NEW_TOKENS = 16
TOP_K = 2  # passages retrieved per question
SHOWN, TIMED = 4, 3  # questions answered side by side, and questions timed
SIZES = (1, TOP_K, 6, 10)  # passages per timed request


@dataclass(kw_only=True)
class DemoSettings:
    out: Annotated[Path, Option(help="Folder of the report.")] = Path("reports/demo")
    questions: Annotated[int, Option(help="Questions of the benchmark.")] = 60
    steps: Annotated[int, Option(help="Training steps; 0 trains nothing.")] = 40
    seed: Annotated[int, Option(help="Draws the questions.")] = 0


@takes(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Index real passages, ask with and without compression, measure, train a little; offline, in a few minutes."""
    console = Console()
    require_matplotlib()  # fail now, not after minutes of work
    console.rule("Load the shipped reader and compressors")
    reader = find_reader("reader-small", "cpu")
    specs = [CompressorSpec.parse(text) for text in COMPRESSORS]
    compressed = [Compressed(load_compressor(spec.name, reader), spec.ratios[0]) for spec in specs]
    run_demo(reader, compressed, read_records(SAMPLE_QUESTIONS), settings, console, train=train_visibly)


def run_demo(
    reader: Reader,
    compressed: Sequence[Compressed],
    records: Sequence[Record],
    settings: DemoSettings,
    console: Console,
    *,
    embed_model: Any = None,
    train: Callable[[DemoSettings, Console], str] | None = None,
) -> Path:
    """Run the demo with a given reader, compressors and questions.

    Args:
        records: All their passages are indexed; questions of the half `report` are asked.
        embed_model: A LlamaIndex embedding; default all-MiniLM-L6-v2.
        train: Trains a few steps and returns a sentence for the report.
    """
    started = time.monotonic()
    console.print(f"The reader has {sum(p.numel() for p in reader.model.parameters()) / 1e6:.1f} million parameters.")
    asked = draw([record for record in records if record.half in (None, "report")], settings)
    console.rule("Index real Wikipedia passages with LlamaIndex")
    index, n_passages = build_index(records, embed_model or SentenceTransformerEmbedding(), console)
    retrieved = retrieve(index, asked)
    found = sum(record.gold is not None for record in retrieved)
    console.print(f"{n_passages} passages indexed; the right one is among the first {TOP_K} for {found} of "
                  f"{len(asked)} questions.")  # fmt: skip

    console.rule("Ask through index.as_query_engine")
    examples = ask_side_by_side(index, reader, compressed, retrieved[:SHOWN], console)

    console.rule("Benchmark on the retrieved passages")
    quality = Settings("demo", MAX_NEW_TOKENS, seed=settings.seed, ttft=TIMED)
    table = lines(compressed, baselines=["truncate", "extract"], shuffled=False, seed=settings.seed)
    rows = [line.row for line in evaluate(reader, table, retrieved, quality)]
    sizes = [n for n in SIZES if n <= n_passages]
    few: dict[str, Any] = {"requests": 1, "repeats": 3, "decode_tokens": 4}
    rows += speed(reader, [*map(Entrant.of, compressed)], records, passages=sizes, dataset="demo", **few)
    console.print(rich_table(line_table(rows, f"{rows[0]['n']} questions, {TOP_K} retrieved passages each")))

    notes = [
        f"{found} of {len(asked)} questions, drawn at random, have the right passage among the {TOP_K} retrieved.",
        "The shipped reader is small, so that all of this runs on two CPU cores: it does not show what large readers do.",
    ]
    if train is not None and settings.steps:
        console.rule("Train a compressor for a few steps")
        notes.append(train(settings, console))

    path = write_report(settings.out / "report.html", rows, title="nutgraf demo", examples=examples, notes=notes)
    console.rule("Report")
    console.print(
        f"Written to [bold]{path.resolve()}[/bold] after {time.monotonic() - started:.0f} seconds.", soft_wrap=True
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
    """A vector index over all passages of the records, one node a passage, and how many there are."""
    passages = {text: title for record in records for text, title in zip(record.passages, record.titles)}
    hidden = ["title"]
    nodes = [
        TextNode(text=t, metadata={"title": name}, excluded_llm_metadata_keys=hidden) for t, name in passages.items()
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


def ask_side_by_side(
    index: VectorStoreIndex,
    reader: Reader,
    compressed: Sequence[Compressed],
    records: Sequence[Record],
    console: Console,
) -> list[Example]:
    """Ask each question through query engines with full text and with every compressor, and without any context."""
    llm = CompressedContextLLM(reader, max_new_tokens=MAX_NEW_TOKENS, stop=["\n"])
    engines = {"full text": index.as_query_engine(llm=llm, similarity_top_k=TOP_K)}
    for method in compressed:
        postprocessor = CompressedContextPostprocessor(method.compressor, ratio=method.ratio)
        engines[method.label] = index.as_query_engine(
            llm=llm, similarity_top_k=TOP_K, node_postprocessors=[postprocessor]
        )
    examples = []
    for record in records:
        answers = {name: str(engine.query(record.question)).strip() for name, engine in engines.items()}
        answers["no context"] = llm.complete(f"Question: {record.question}\nAnswer:").text.strip()
        examples.append(Example(record.question, record.answers, answers, record.gold_text))
        console.print(Text(record.question, style="bold"))
        table = Table(show_header=False, box=None)
        table.add_row("right answer", Text(record.answers[0]), style="dim")
        for name, answer in answers.items():
            right = exact_match(answer, record.answers) == 1
            table.add_row(name, Text(answer or "(nothing)"), style="green" if right else None)
        console.print(table, "")
    return examples


def train_visibly(settings: DemoSettings, console: Console) -> str:
    """Train a new xRAG projector on the shipped articles for a few steps, with the trainer's progress bar."""
    from ...recipes.tasks.registry import make_task
    from ...recipes.training.schema import load_recipe
    from ...recipes.training.trainer import run_recipe

    overrides = [
        f"data.dir={SAMPLE}",
        f"data.texts=[{SAMPLE_ARTICLES.name}]",
        "data.questions=[]",
        f"stages.0.steps={settings.steps}",
        "stages.0.batch_size=8",
        "stages.0.warmup=2",
        "stages.0.log_every=5",
    ]
    recipe = load_recipe("xrag", overrides)
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
    with tempfile.TemporaryDirectory(prefix="nutgraf-demo-") as folder:
        run_recipe(recipe, make_task(recipe), Path(folder))
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    said = (
        f"Trained here for {settings.steps} steps: a new xRAG projector, restating passages of the shipped articles, "
        f"with its loss going from {losses[0]:.2f} to {losses[-1]:.2f}. The figures above are those of the shipped compressors."
    )
    console.print(said)
    return said
