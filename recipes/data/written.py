"""Questions made by rule with the answers of a reader of the text: sequence-level distillation (PISCO, arXiv 2501.16075).

``python -m nutgraf.recipes.data.written OUT.jsonl --help``. Started again, it goes on where it was stopped. Recipes name the
file under `data.questions`; the source of its rows is ``written``. Answers that do not occur in the passage are left out there.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...compressors import CompressedPassage, Reader
from ...compressors.fidelity.questions import make_questions
from ...compressors.reader.plan import PromptPlan
from ...compressors.reader.shared import prefix_cache
from ...console import friendly_errors
from .records import Material, load_articles
from .templates import QUESTION, SEPARATOR

PASSAGES = 4  # read at a time


def answers(
    reader: Reader, passages: Sequence[str], questions: Sequence[Sequence[str]], longest: int = 16
) -> list[list[str]]:
    """The reader's greedy answers to the questions about each passage, whose text it reads once.

    Args:
        reader: the reader.
        passages: the passages, none empty.
        questions: questions about each.
        longest: tokens of an answer at most.
    """
    bos, ids, plans = list(reader.bos_ids), reader.tokenize_batch(passages), []
    for tokens in ids:
        plans.append(PromptPlan())
        plans[-1].add_tokens([*bos, *tokens])
    with torch.no_grad():
        layers, valid = prefix_cache(reader, plans)
    prompts = []
    for row, (tokens, asked) in enumerate(zip(ids, questions, strict=True)):
        own = torch.arange(valid.shape[1])[valid[row].cpu()][len(bos) :].to(valid.device)
        keys, values = (tuple(pair[which][row][:, own] for pair in layers) for which in (0, 1))
        positions = torch.arange(len(bos), len(bos) + len(tokens))
        read = CompressedPassage(
            "kv", len(tokens), "identity", reader.fingerprint, keys=keys, values=values, positions=positions
        )
        prompts += [[read, SEPARATOR + QUESTION.format(question=question)] for question in asked]
    given = iter(reader.generate(prompts, longest, batch_size=48) if prompts else [])
    return [[next(given).strip() for _ in asked] for asked in questions]


def write(reader: Reader, material: Material, out: Path, passages: int, questions: int, seed: int = 0) -> None:
    """Appends the rows of `passages` passages to `out`, after those that it holds.

    Args:
        reader: who answers.
        material: paragraphs to draw from.
        out: JSON lines; passage i depends on the seed and i alone.
        passages: how many in all.
        questions: of each passage.
        seed: of the draws.
    """
    for first in range(_written(out), passages, PASSAGES):
        numbers = range(first, min(first + PASSAGES, passages))
        rngs = [random.Random(f"{seed}/written/{i}") for i in numbers]
        texts = [material.paragraph(rng, rng.choice([300, 600, material.max_chars])) for rng in rngs]
        asked = [[q for q, _ in make_questions(text, questions, rng)] for text, rng in zip(texts, rngs)]
        rows: list[dict[str, Any]] = []
        for i, text, own, given in zip(numbers, texts, asked, answers(reader, texts, asked)):
            about = {"passages": [{"title": "", "text": text}], "gold": 0, "source": "written"}
            rows += [{"id": f"written-{i}", "question": q, "answers": [a], **about} for q, a in zip(own, given)]
        with out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _written(out: Path) -> int:
    """Number of passages done, as a multiple of those read at a time; cuts what a killed process left of a line."""
    if not out.exists():
        return 0
    ends, numbers = [0], []
    for line in out.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            ends.append(ends[-1] + len(line))
            numbers.append(int(json.loads(line)["id"].rsplit("-", 1)[1]))
    # The rows of the last passages may be incomplete: they are written again.
    last = numbers[-1] // PASSAGES * PASSAGES if numbers else 0
    os.truncate(out, ends[sum(number < last for number in numbers)])
    return last


def main(
    out: Annotated[Path, typer.Argument(help="The question file to write.")],
    data: Annotated[Path, typer.Option(help="Folder of the texts.")],
    texts: Annotated[list[str], typer.Option(help="Text files, by name or pattern.")],
    reader: Annotated[str, typer.Option(help="A shipped reader, a folder or a hub id.")] = "reader-smollm2",
    passages: Annotated[int, typer.Option(help="Passages in all.")] = 2000,
    questions: Annotated[int, typer.Option(help="Questions of each.")] = 10,
    documents: Annotated[int, typer.Option(help="Articles of each file.")] = 3000,
    max_chars: Annotated[int, typer.Option(help="Longest passage, in characters.")] = 900,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Write the answers of a reader of the text to questions made by rule."""
    with friendly_errors():
        material = Material([], load_articles(texts, data, documents), max_chars)
        write(Reader.from_pretrained(reader), material, out, passages, questions, seed)


if __name__ == "__main__":
    typer.run(main)
