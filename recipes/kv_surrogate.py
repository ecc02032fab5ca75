"""Fits a score of kv-match to a reader: a surrogate by ridge regression on the scores that probes give, minutes on a CPU.

python -m nutgraf.recipes.kv_surrogate data/text_enwiki2018_1.txt.xz FOLDER --reader reader-smollm2
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compressors import Reader, make_compressor
from .data.corpus import read_documents, split_paragraphs
from .data.records import cut_at_sentence

SHORTEST, LONGEST = 150, 2000  # characters of a passage


def draw_passages(documents: Iterable[str], count: int, seed: int = 0) -> list[str]:
    """Draws passages of all lengths, one of a document: whole sentences from the beginning of a random paragraph.

    Raises:
        ValueError: if there are fewer documents than passages.
    """
    rng = random.Random(seed)
    found = []
    for document in documents:
        paragraphs = split_paragraphs(document)
        if not paragraphs:
            continue
        text = "\n\n".join(paragraphs[rng.randrange(len(paragraphs)) :])
        most = math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST)))
        found.append(cut_at_sentence(text, int(most)))
    if len(found) < count:
        raise ValueError(f"{count} passages need as many documents with paragraphs, got {len(found)}.")
    return rng.sample(found, count)


def main(
    text: Annotated[Path, typer.Argument(help="Documents of plain text, separated by lines <|doc|>.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    reader: Annotated[str, typer.Option(help="Reader: a shipped one, a folder or a hub id.")] = "reader-smollm2",
    passages: Annotated[int, typer.Option(help="Passages; every eighth is held out.")] = 48,
    probes: Annotated[int, typer.Option(help="Rule-made questions per passage whose scores are fitted.")] = 48,
    repair_probes: Annotated[
        int, typer.Option(help="Rule-made questions per passage that it reads if repair is switched on.")
    ] = 8,
    score: Annotated[str, typer.Option(help="What is fitted: surrogate, or expected-stats.")] = "surrogate",
    dtype: Annotated[str, typer.Option(help="In which the reader runs.")] = "bfloat16",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fit a score and save the compressor that uses it."""
    loaded = Reader.from_pretrained(reader, dtype=dtype)
    compressor: Any = make_compressor("kv-match", loaded, score=score, repair="none", probes=repair_probes)
    if compressor.fitted is None:
        raise typer.BadParameter(f"The score {score!r} has no weights; surrogate and expected-stats have.")
    about = compressor.fitted.fit(loaded, draw_passages(read_documents(text), passages, seed), probes)
    compressor.save_pretrained(out)
    typer.echo(json.dumps(about))


if __name__ == "__main__":
    typer.run(main)
