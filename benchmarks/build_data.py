"""Build the full question sets from their public sources: `python -m nutgraf.benchmarks.build_data squad nq --out data`.

| name | source on the Hugging Face hub | passages | licence |
|---|---|---|---|
| `squad` | `rajpurkar/squad`, validation | the gold one | CC BY-SA 4.0 |
| `squad_10` | the same | and nine distractors, half of them of the same article | CC BY-SA 4.0 |
| `nq` | `Tevatron/wikipedia-nq`, dev | the gold one of Natural Questions (open), DPR's split | CC BY-SA 3.0 |
| `nq_10` | the same | and nine BM25 distractors without the answer | CC BY-SA 3.0 |
| `hotpotqa` | `hotpotqa/hotpot_qa`, distractor, validation | its own ten, two of them needed | CC BY-SA 4.0 |

Files are JSON lines: `id`, `question`, `answers`, `passages` (list of `{title, text}`), `gold`, `source`, `half` (`tune` or
`report`, from a hash of the article's title or of the question). Equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compressors.core.files import write_atomically
from ..console import friendly_errors

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Arguments of `datasets.load_dataset`."""

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | None = None


SQUAD = Source("rajpurkar/squad", split="validation")
NQ = Source("json", data_files="hf://datasets/Tevatron/wikipedia-nq/nq-dev.jsonl.gz")
HOTPOTQA = Source("hotpotqa/hotpot_qa", "distractor", "validation")


def squad(rows: Iterable[Json]) -> Iterator[Json]:
    """SQuAD v1.1 with the gold passage alone."""
    for row in rows:
        title = row["title"].replace("_", " ")
        passages = [{"title": title, "text": row["context"].strip()}]
        yield _record(row["id"], row["question"], row["answers"]["text"], passages, 0, "squad_v1.1_dev", title)


def squad_10(rows: Iterable[Json], passages: int = 10, every: int = 4) -> Iterator[Json]:
    """Every fourth question of SQuAD v1.1 among distractors that hold none of its answers, in random order.

    Half of the distractors are of the same article where it has as many, the rest of others.
    """
    records = list(squad(rows))
    pool = list({record["passages"][0]["text"]: record["passages"][0] for record in records}.values())
    for record in records[::every]:
        rng = random.Random(record["id"])
        gold = record["passages"][0]
        free = [p for p in pool if not any(answer.lower() in p["text"].lower() for answer in record["answers"])]
        own = [p for p in free if p["title"] == gold["title"]]
        near = rng.sample(own, min(len(own), passages // 2))
        far = [p for p in free if p["title"] != gold["title"]]
        if len(far) + len(near) < passages - 1:
            continue
        yield _among(record, [*near, *rng.sample(far, passages - 1 - len(near))], rng, "squad_v1.1_dev, distractors")


def nq(rows: Iterable[Json]) -> Iterator[Json]:
    """Natural Questions (open) with its gold Wikipedia passage; questions without one are left out."""
    for row in rows:
        if row["positive_passages"]:
            gold = [_passage(row["positive_passages"][0])]
            yield _record(str(row["query_id"]), row["query"], row["answers"], gold, 0, "nq_open_dev", row["query"])


def nq_10(rows: Iterable[Json], passages: int = 10) -> Iterator[Json]:
    """Natural Questions (open) among BM25 distractors that hold none of its answers, in random order."""
    kept = [row for row in rows if row["positive_passages"]]
    for row, record in zip(kept, nq(kept)):
        rng = random.Random(record["id"])
        answers = [answer.lower() for answer in record["answers"]]
        others = [_passage(p) for p in row["negative_passages"] if not any(a in p["text"].lower() for a in answers)]
        if len(others) >= passages - 1:
            yield _among(record, others[: passages - 1], rng, "nq_open_dev, BM25 distractors")


def hotpotqa(rows: Iterable[Json]) -> Iterator[Json]:
    """HotpotQA with its own ten passages; `gold` is the last of those that are needed."""
    for row in rows:
        context, needed = row["context"], set(row["supporting_facts"]["title"])
        passages = [{"title": t, "text": "".join(s).strip()} for t, s in zip(context["title"], context["sentences"])]
        gold = max((i for i, title in enumerate(context["title"]) if title in needed), default=None)
        if passages and gold is not None:
            yield _record(row["id"], row["question"], [row["answer"]], passages, gold, "hotpotqa_dev", row["id"])


SETS: dict[str, tuple[Source, Callable[[Iterable[Json]], Iterator[Json]]]] = {
    "squad": (SQUAD, squad),
    "squad_10": (SQUAD, squad_10),
    "nq": (NQ, nq),
    "nq_10": (NQ, nq_10),
    "hotpotqa": (HOTPOTQA, hotpotqa),
}


def build(name: str, out: str | Path) -> Path:
    """Fetch one set and write `OUT/NAME.jsonl`, whole or not at all.

    Raises ValueError for an unknown name, and if the source cannot be reached.
    """
    if name not in SETS:
        raise ValueError(f"There is no question set {name!r}; known are {', '.join(SETS)}.")
    source, convert = SETS[name]
    path = Path(out) / f"{name}.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in convert(fetch(source))]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def fetch(source: Source) -> Iterator[Json]:
    """The rows of a source, fetched or from the local cache. Raises ValueError with what to do when that fails."""
    import datasets

    options = {} if source.data_files is None else {"data_files": source.data_files}
    try:
        found = datasets.load_dataset(source.path, source.name, split=source.split, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.data_files or source.path} cannot be fetched: {error}. Building the full sets needs the network (and "
            "HF_HUB_OFFLINE unset); the sample in nutgraf/benchmarks/sample needs neither."
        ) from error
    return iter(found)


def main(
    names: Annotated[list[str], typer.Argument(help=f"Sets to build: {', '.join(SETS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("data"),
) -> None:
    """Build question sets."""
    with friendly_errors():
        for name in names:
            typer.echo(str(build(name, out)))


def _record(
    id: str, question: str, answers: Iterable[str], passages: list[Json], gold: int, source: str, by: str
) -> Json:
    half = "tune" if hashlib.sha256(by.encode()).digest()[0] % 2 else "report"
    return {
        "id": id,
        "question": " ".join(question.split()),
        "answers": list(dict.fromkeys(answer.strip() for answer in answers if answer.strip())),
        "passages": passages,
        "gold": gold,
        "source": source,
        "half": half,
    }


def _among(record: Json, others: list[Json], rng: random.Random, source: str) -> Json:
    gold = record["passages"][0]
    mixed = [gold, *others]
    rng.shuffle(mixed)
    return record | {"passages": mixed, "gold": mixed.index(gold), "source": source}


def _passage(found: Json) -> Json:
    return {"title": found["title"], "text": found["text"].strip()}


if __name__ == "__main__":
    typer.run(main)
