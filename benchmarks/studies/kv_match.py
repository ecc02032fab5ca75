"""Studies of kv-match: what ranks the pairs (on the tune halves), and whether later questions on a passage fare as the first.

python -m nutgraf.benchmarks.studies.kv_match scores --out benchmarks/results/kv_scores.jsonl
python -m nutgraf.benchmarks.studies.kv_match order --out benchmarks/results/kv_order.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ...compressors import CompressedPassage, Reader, load_compressor
from ...compressors.core.files import write_atomically
from ...compressors.kv import repair, selection
from ...compressors.kv.pairs import shared_reading
from ...compressors.kv.probing import Evidence, LayerEvidence, read
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece, question_prompt
from .. import metrics
from ..loading import dataset_name, find_reader, find_records
from ..methods import named_methods, prompt_size
from ..progress import progress_bar
from ..quality.quality import Settings, head, questions_hash, readable
from ..quality.remaining import holds
from ..quality.scoring import answers, kl_divergence, likelihoods, score_each
from ..quality.source_hash import code_of
from ..rows import Row, append_rows, clean, provenance, read_rows

Weight = Callable[[Reader, LayerEvidence, Tensor, int], Tensor]
app = typer.Typer(no_args_is_help=True, help=__doc__)
ReaderName = Annotated[str, typer.Option(help="A reader of the Llama family.")]
Sets = Annotated[list[str], typer.Option(help="Question files.")]
BLOCK = 4  # passages that are read, compressed and asked together
Out = Annotated[Path | None, typer.Option(help="Results file to append rows to.")]


def _norm(reader: Reader, layer: LayerEvidence, attention: Tensor, index: int) -> Tensor:
    return selection.value_norm(layer)


def _norm_within_head(reader: Reader, layer: LayerEvidence, attention: Tensor, index: int) -> Tensor:
    norm = _norm(reader, layer, attention, index)
    return norm / norm.mean(-1, keepdim=True)


def _written(reader: Reader, layer: LayerEvidence, attention: Tensor, index: int) -> Tensor:
    """Mean norm of what the heads of a group write to the residual stream for a value."""
    heads, width = layer.values.shape[1], layer.values.shape[3]
    matrix = selection.wide(selection.output_weight(reader.kv_placement, index)).unflatten(1, (heads, -1, width))
    return torch.einsum("ehgd,bhnd->bhgne", matrix, selection.wide(layer.values)).norm(dim=-1).mean(2)


def _distance(reader: Reader, layer: LayerEvidence, attention: Tensor, index: int) -> Tensor:
    """``[batch, kv_heads, rows, n]`` distance of a value from a row's output (CAOTE, arXiv 2504.14051)."""
    values = selection.wide(layer.values)
    output = attention @ values
    square = values.square().sum(-1)[:, :, None] - 2 * output @ values.mT + output.square().sum(-1, keepdim=True)
    return square.clamp(min=0).sqrt()


def ranked(reader: Reader, power: float, weight: Weight | None = None, strength: float = 1.0) -> selection.Score:
    """A score: mean of some power of the rows' attention, times a weight of the value."""

    def score(layer: LayerEvidence, evidence: Evidence, placement: Any, index: int) -> Tensor:
        attention = selection.attention(layer, evidence)
        factor = torch.ones(()) if weight is None else weight(reader, layer, attention, index).pow(strength)
        if factor.dim() == attention.dim():  # a factor per row
            attention, factor = attention * factor, torch.ones(())
        return (attention.pow(power).sum(2) / selection.count_rows(layer, evidence)).pow(1 / power) * factor

    return score


ADOPTED = "p^4, value norm"


def variants(reader: Reader) -> dict[str, tuple[selection.Score, dict[str, float]]]:
    """Of each variant its score, and constants of `selection` and `repair` that it changes."""
    adopted = ranked(reader, 4, _norm)
    return {
        "p^2": (ranked(reader, 2), {}),
        "p^4": (ranked(reader, 4), {}),
        "p^2, root of the value norm": (ranked(reader, 2, _norm, 0.5), {}),
        "p^2, value norm": (ranked(reader, 2, _norm), {}),
        "p^2, value norm within the head": (ranked(reader, 2, _norm_within_head), {}),
        "p^2, written norm": (ranked(reader, 2, _written), {}),
        "p^2, distance from the output": (ranked(reader, 2, _distance), {}),
        "p^3, value norm": (ranked(reader, 3, _norm), {}),
        ADOPTED: (adopted, {}),
        "p^8, value norm": (ranked(reader, 8, _norm), {}),
        f"{ADOPTED}, no floor": (adopted, {"FLOOR": 0.0}),
        f"{ADOPTED}, value ridge 1e-3": (adopted, {"VALUE_RIDGE": 1e-3}),
        f"{ADOPTED}, value ridge 1e-1": (adopted, {"VALUE_RIDGE": 1e-1}),
        f"{ADOPTED}, weight ridge 1e-1": (adopted, {"WEIGHT_RIDGE": 1e-1}),
    }


@contextmanager
def changed(constants: dict[str, float]) -> Iterator[None]:
    """Sets constants of `selection` and `repair` for a while."""
    homes = {name: selection if hasattr(selection, name) else repair for name in constants}
    before = {name: getattr(home, name) for name, home in homes.items()}
    for name, home in homes.items():
        setattr(home, name, constants[name])
    try:
        yield
    finally:
        for name, home in homes.items():
            setattr(home, name, before[name])


@torch.no_grad()
def variants_of(reader: Reader, text: str, ratios: Sequence[float]) -> dict[tuple[str, float], CompressedPassage]:
    """A passage compressed by every variant at every ratio; it is read once."""
    compressor: Any = load_compressor("kv-match", reader=reader)
    (ids,) = reader.tokenize_batch([text])
    evidence = read(reader, [ids], [compressor.probes(text, None, None)])
    evidence.shared = True
    found = {}
    for name, (score, constants) in variants(reader).items():
        own = selection.SCORES["probes"]
        selection.SCORES["probes"] = (score, "questions")
        try:
            with changed(constants):
                for ratio in ratios:
                    (pairs,) = compressor.keep(evidence, ratio)
                    found[name, ratio] = compressor._package(pairs, ids, ratio, 0)
        finally:
            selection.SCORES["probes"] = own
    return found


@app.command()
def scores(
    file: Sets = ["data/qa_dev_squad.jsonl.xz", "data/qa_dev_nq.jsonl.xz"],  # noqa: B006
    limit: Annotated[int, typer.Option(help="Questions per file.")] = 16,
    ratio: Annotated[list[float], typer.Option()] = [8.0, 16.0],  # noqa: B006
    reader: ReaderName = "reader-smollm2",
    out: Out = None,
) -> None:
    """Loss of the reference answers and KL to the full text, by what ranks the pairs, on the tune halves."""
    loaded = find_reader(reader, dtype="bfloat16")
    records = [record for name in file for record in find_records(name, "tune", limit)]
    losses: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for record in records:
        made = variants_of(loaded, record.passages[0], ratio)
        target = loaded.tokenize(" " + record.answers[0])
        contexts: list[Piece] = [record.passages[0], *made.values()]
        asked = [question_prompt([passage], record.question) for passage in contexts]
        full, *found = likelihoods(loaded, asked, [target] * len(asked), batch_size=32)
        for key, likely in zip(made, found):
            losses.setdefault(key, []).append((-float(likely.log_probs.sum()), kl_divergence(loaded, full, likely)))
    rows = []
    for (variant, at), values in losses.items():
        row: Row = {"suite": "study", "test": "kv-scores", "method": "kv-match", "variant": variant, "ratio_asked": at}
        row |= {"sets": [dataset_name(each) for each in file], "half": "tune", "n": len(records)}
        for i, figure in enumerate(("nll", "kl_to_full")):
            ours, adopted = np.array(values)[:, i], np.array(losses[ADOPTED, at])[:, i]
            row |= {figure: float(ours.mean()), f"{figure}_change": float((ours - adopted).mean())}
            row |= dict(zip((f"{figure}_change_low", f"{figure}_change_high"), metrics.bootstrap_mean(ours - adopted)))
        rows.append(clean(row | provenance(loaded, 0)))
        typer.echo(json.dumps({key: rows[-1][key] for key in ("variant", "ratio_asked", "nll", "kl_to_full")}))
    if out is not None:
        append_rows(out, rows)


def planes() -> list[str]:
    """Names of the choices: all budgets and repairs for questions; other scores in one ranking and in their own budget."""
    own = {"kvzip": "uniform", "kvzip+": "uniform", "keydiff": "uniform", "expected": "per-layer", "snapkv": "uniform"}
    named = [f"budget={b},repair={r}" for b in selection.BUDGETS for r in ("bias+values", "bias", "none")][1:]
    for score in (*own, "random", "first"):
        named += [f"score={score},repair=none", f"score={score}"]
        named += [f"score={score},budget={own[score]},repair=none"] if score in own else []
    return [f"kv-match:{changed}" for changed in named]


@app.command()
def choices(
    file: Annotated[str, typer.Argument(help="Questions with one passage each.")],
    limit: Annotated[int | None, typer.Option(help="At most this many questions of the report half.")] = None,
    ratio: Annotated[list[float], typer.Option()] = [2.0, 4.0, 8.0, 16.0],  # noqa: B006
    reader: ReaderName = "reader-smollm2",
    out: Out = None,
) -> None:
    """Every score, budget and repair on the same questions. Passages are read once for all; rows that --out holds stay.

    Run it again after a stop: what was answered is kept beside --out.
    """
    loaded, settings = find_reader(reader, dtype="bfloat16"), Settings(dataset_name(file), likelihood=False)
    records = readable(loaded, find_records(file, "report", limit), settings.max_new_tokens)
    there = read_rows(out) if out is not None and out.is_file() else []
    there = [row for row in there if row.get("questions") == questions_hash(records)]
    lines = [line for line in named_methods(loaded, planes(), ratio) if not holds(there, line, loaded, settings)]
    if not lines:
        typer.echo(f"{out} holds all choices of {settings.dataset}.")
        return
    compressors: dict[int, Any] = {id(line.compressor): line.compressor for line in lines}
    kept = None if out is None else out.with_name(f"{out.stem}.{settings.dataset}.partial.json")
    key = [questions_hash(records), loaded.fingerprint, *(f"{line.label} {code_of(line.compressor)}" for line in lines)]
    done, sizes = 0, dict[str, list[Any]]()
    given: dict[str, list[str]] = {name: [] for name in ("full", "none", *(line.label for line in lines))}
    if kept is not None and kept.is_file() and (state := json.loads(kept.read_text()))["key"] == key:
        done, given, sizes = state["done"], state["given"], state["sizes"]
    with progress_bar(True) as bar:
        task = bar.add_task(settings.dataset, total=len(records), completed=done)
        for start in range(done, len(records), BLOCK):
            part = records[start : start + BLOCK]
            contexts: dict[str, list[list[Piece]]] = {
                "full": [list(r.passages) for r in part],
                "none": [[] for _ in part],
            }
            with shared_reading(compressors.values()):
                for line in lines:
                    asked = [r.question for r in part] if line.query_aware else None
                    made = line.compressor.compress([r.passages[0] for r in part], asked, line.ratio)
                    contexts[line.label] = [[passage] for passage in made]
                    tokens = [prompt_size(loaded, question_prompt([p], r.question)) for p, r in zip(made, part)]
                    sizes.setdefault(line.label, []).extend(zip([passage.nbytes for passage in made], tokens))
            prompts = [question_prompt(c, r.question) for each in contexts.values() for c, r in zip(each, part)]
            found = answers(loaded, prompts, max_new_tokens=settings.max_new_tokens, batch_size=32)
            for place, name in enumerate(contexts):
                given[name] += found[place * len(part) : (place + 1) * len(part)]
            if kept is not None:
                state = {"key": key, "done": start + len(part), "given": given, "sizes": sizes}
                write_atomically(kept, json.dumps(state).encode())
            bar.advance(task, len(part))
    f1 = {name: score_each(texts, records)["f1"] for name, texts in given.items()}
    rows = []
    for line in lines:
        ours = f1[line.label]
        row = (
            head(loaded, line, records, settings)
            | line.about()
            | {"half": "report", "questions": questions_hash(records)}
        )
        row |= {"f1": float(ours.mean()), "f1_each": [round(float(score), 3) for score in ours], "ratio": line.ratio}
        row |= dict(zip(("bytes_per_passage", "reader_tokens"), np.mean(sizes[line.label], axis=0).tolist()))
        row |= {
            "rouge_beta": settings.beta,
            "max_new_tokens": settings.max_new_tokens,
            "code": code_of(line.compressor),
        }
        rows.append(clean(row | metrics.recovered(ours, f1["none"], f1["full"])))
    if out is not None:
        append_rows(out, rows)
    if kept is not None:
        kept.unlink(missing_ok=True)
    typer.echo(f"{len(rows)} rows of {settings.dataset}.")


@app.command()
def order(
    file: Annotated[
        str, typer.Option(help="Questions, several of them on the same passage.")
    ] = "data/qa_dev_squad.jsonl.xz",
    passages: Annotated[int, typer.Option(help="Passages, the first of the report half with enough questions.")] = 20,
    questions: Annotated[int, typer.Option(help="Questions on each.")] = 3,
    ratio: float = 4.0,
    reader: ReaderName = "reader-smollm2",
    out: Out = None,
) -> None:
    """F1 of the first, second and third question on passages that are compressed once."""
    loaded = find_reader(reader, dtype="bfloat16")
    groups: dict[str, list[Record]] = {}
    for record in find_records(file, "report"):
        groups.setdefault(record.passages[0], []).append(record)
    chosen = [group[:questions] for group in groups.values() if len(group) >= questions][:passages]
    texts = [group[0].passages[0] for group in chosen]
    made = load_compressor("kv-match", reader=loaded).compress(texts, ratio=ratio)
    rows = []
    for place in range(questions):
        asked = [group[place] for group in chosen]
        row: Row = {
            "suite": "study",
            "test": "kv-order",
            "method": "kv-match",
            "ratio_asked": ratio,
            "place": place + 1,
        }
        f1 = {}
        for name, contexts in (("full", texts), ("none", None), ("ours", made)):
            prompts = [
                question_prompt([] if contexts is None else [contexts[i]], r.question) for i, r in enumerate(asked)
            ]
            given = answers(loaded, prompts, max_new_tokens=24, batch_size=16)
            f1[name] = score_each(given, asked)["f1"]
        row |= {
            "f1": float(f1["ours"].mean()),
            "f1_full": float(f1["full"].mean()),
            "f1_none": float(f1["none"].mean()),
        }
        row |= metrics.recovered(f1["ours"], f1["none"], f1["full"]) | {"n": len(asked), "half": "report"}
        row["f1_each"] = [round(float(score), 3) for score in f1["ours"]]
        rows.append(clean(row | provenance(loaded, 0)))
        typer.echo(json.dumps(rows[-1]))
    if out is not None:
        append_rows(out, rows)


if __name__ == "__main__":
    app()
