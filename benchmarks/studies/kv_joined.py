"""Passages that were compressed each on its own and are read together, against reading their texts jointly.

python -m nutgraf.benchmarks.studies.kv_joined data/qa_dev_nq_10.jsonl.xz --out benchmarks/results/kv_joined.jsonl
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from ...compressors import CompressedPassage, Reader, load_compressor
from ...compressors.kv.pairs import PairCompressor, shared_reading
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece, question_prompt
from .. import metrics
from ..baselines import BASELINES
from ..loading import dataset_name, find_reader, find_records
from ..methods import prompt_size
from ..progress import progress_bar
from ..quality.quality import questions_hash, readable
from ..quality.scoring import Likelihood, answers, kl_divergence, likelihoods, score_each
from ..rows import Row, append_rows, clean, provenance

BLOCK = 2  # questions whose lines are read together
GOLD, OTHERS = "only the gold passage compressed", "only the other passages compressed"


def compressors(reader: Reader, reread: list[int]) -> dict[str, PairCompressor]:
    """The methods by the names of their lines."""
    found: dict[str, Any] = {"kv-match": load_compressor("kv-match", reader=reader)}
    for tokens in reread:
        found[f"kv-match:reread={tokens}"] = load_compressor("kv-match", reader=reader, reread=tokens)
    return found


def lines_of(
    reader: Reader, record: Record, methods: dict[str, PairCompressor], ratios: list[float], parts: bool
) -> dict[tuple[str, float | None], list[Piece]]:
    """What stands before the question in each line; every passage is read once for all of them."""
    texts = list(record.passages)
    found: dict[tuple[str, float | None], list[Piece]] = {("full", None): list(texts), ("none", None): []}
    with shared_reading(methods.values()):
        for ratio in ratios:
            for name, method in methods.items():
                found[name, ratio] = list(method.compress(texts, ratio=ratio))
        whole = methods["kv-match"].compress(texts, ratio=1) if parts else []
    for ratio in ratios:
        ours = found["kv-match", ratio]
        if parts and ratio > 1:
            found[GOLD, ratio] = [ours[i] if i == record.gold else whole[i] for i in range(len(texts))]
            found[OTHERS, ratio] = [whole[i] if i == record.gold else ours[i] for i in range(len(texts))]
        if ratio > 1:
            budget = prompt_size(reader, question_prompt(ours, record.question))
            found["truncate", ratio] = list(
                BASELINES["truncate"](reader, record.question, texts, budget, random.Random(0))
            )
    return found


def read_apart(
    reader: Reader, prompts: list[list[Piece]], targets: list[list[int]]
) -> tuple[list[str], list[Likelihood]]:
    """Answers and likelihoods; long texts are not batched with compressed passages, of which few positions run."""
    texts = [i for i, pieces in enumerate(prompts) if all(isinstance(piece, str) for piece in pieces)]
    given, likely = [""] * len(prompts), cast(list[Likelihood], [None] * len(prompts))
    for part in (texts, sorted(set(range(len(prompts))) - set(texts))):
        chosen = [prompts[i] for i in part]
        for i, answer in zip(part, answers(reader, chosen, max_new_tokens=24, batch_size=16)):
            given[i] = answer
        for i, found in zip(part, likelihoods(reader, chosen, [targets[i] for i in part], batch_size=16)):
            likely[i] = found
    return given, likely


def main(
    file: Annotated[str, typer.Argument(help="Questions with several passages each.")],
    passages: Annotated[int, typer.Option(help="Passages per question.")] = 5,
    limit: Annotated[int, typer.Option(help="Questions.")] = 100,
    ratio: Annotated[list[float], typer.Option()] = [1.0, 2.0, 4.0, 8.0],  # noqa: B006
    reread: Annotated[list[int], typer.Option(help="First tokens that are read again.")] = [],  # noqa: B006
    half: Annotated[str, typer.Option()] = "report",
    parts: Annotated[bool, typer.Option(help="Also the gold passage or the others alone compressed.")] = False,
    reader: str = "reader-smollm2",
    out: Annotated[Path | None, typer.Option(help="Results file to append rows to.")] = None,
) -> None:
    """F1, loss of the reference answers and KL to reading the texts jointly."""
    loaded = find_reader(reader, dtype="bfloat16")
    records = readable(loaded, find_records(file, half, limit, passages=passages), 24)
    methods = compressors(loaded, reread)
    scores: dict[tuple[str, float | None], list[tuple[float, ...]]] = {}
    with progress_bar(True) as bar:
        task = bar.add_task(dataset_name(file), total=len(records))
        for start in range(0, len(records), BLOCK):
            part = records[start : start + BLOCK]
            lines = [lines_of(loaded, record, methods, ratio, parts) for record in part]
            keys = list(lines[0])
            asked = [question_prompt(each[key], r.question) for r, each in zip(part, lines) for key in keys]
            of = [record for record in part for _ in keys]
            targets = [loaded.tokenize(" " + record.answers[0]) for record in of]
            given, likely = read_apart(loaded, asked, targets)
            f1 = score_each(given, of)["f1"]
            for i, prompt in enumerate(asked):
                full = likely[i - i % len(keys)]
                pieces = list(lines[i // len(keys)][keys[i % len(keys)]])
                made = [piece for piece in pieces if isinstance(piece, CompressedPassage)]
                nll, kl = -float(likely[i].log_probs.sum()), kl_divergence(loaded, full, likely[i])
                size = float(np.mean([piece.nbytes for piece in made])) if made else 0.0
                numbers = (float(f1[i]), nll, kl, float(prompt_size(loaded, prompt)), size)
                scores.setdefault(keys[i % len(keys)], []).append(numbers)
            bar.advance(task, len(part))
    each = {key: np.array(values) for key, values in scores.items()}
    rows = []
    for (name, at), values in each.items():
        row: Row = {"suite": "study", "test": "kv-joined", "dataset": dataset_name(file), "half": half}
        row |= {"method": name, "passages": passages, "ratio_asked": at, "n": len(records)}
        row |= dict(zip(("f1", "nll", "kl_to_full", "reader_tokens", "bytes_per_passage"), values.mean(0).tolist()))
        row["f1_each"] = [round(float(score), 3) for score in values[:, 0]]
        row |= metrics.recovered(values[:, 0], each["none", None][:, 0], each["full", None][:, 0])
        if at is not None and name != "kv-match":
            for i, measure in enumerate(("f1", "nll", "kl_to_full")):
                change = values[:, i] - each["kv-match", at][:, i]
                row[f"{measure}_change"] = float(change.mean())
                row |= dict(zip((f"{measure}_change_low", f"{measure}_change_high"), metrics.bootstrap_mean(change)))
        rows.append(clean(row | {"questions": questions_hash(records)} | provenance(loaded, 0)))
        shown = ("method", "ratio_asked", "f1", "nll", "kl_to_full", "reader_tokens")
        typer.echo(json.dumps({key: rows[-1].get(key) for key in shown}))
    if out is not None:
        append_rows(out, rows)


if __name__ == "__main__":
    typer.run(main)
