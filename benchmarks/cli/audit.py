# ruff: noqa: RUF009 (`many` makes a dataclass field)
"""`nutgraf audit`: what someone who copies stored slots, keys and values, or vectors can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from ...adapters.store import StoreError
from ...compressors import Reader
from ...compressors.encoders.embedder import MINILM, Embedder, load_embedder
from ...recipes.data.corpus import read_documents, split_paragraphs
from ...recipes.data.overlap import HeldOut
from ...recipes.data.records import cut_at_sentence
from ..audit.attackers import ATTACKERS, Attacker
from ..audit.audit import Outcome, audit, baseline, sentence, worst
from ..audit.corpus_statistics import CorpusStatistics
from ..audit.page import audit_table, write_page
from ..audit.targets import Target, compressed, spread, stored, vectors
from ..loading import SAMPLE_ARTICLES, dataset_name, find_records
from ..report.table import rich_table
from ..rows import clean, provenance
from .expand import takes, wide_console
from .options import Named, Names, many

MAX_CHARS = 1000  # of a public passage


@dataclass(kw_only=True)
class AuditOptions(Named):
    file: Annotated[
        str, Argument(help="Passages to attack: questions (.jsonl or .jsonl.xz), or `sample` for the shipped ones.")
    ] = "sample"
    store: Annotated[
        str | None, Option(help="Audit the passages of this store, a folder or a URI, instead of a compressor's.")
    ] = None
    embedder: Annotated[str | None, Option(help=f"Audit the retrieval vectors of this embedder, such as {MINILM}.")] = (
        None
    )
    attacker: Annotated[Names, Option(help=f"{', '.join(ATTACKERS)}; default all that apply.")] = many()
    limit: Annotated[int, Option(min=2, help="At most this many passages, evenly spread.")] = 100
    public: Annotated[
        Path | None,
        Option(help="Public text (.txt, .txt.xz) that attackers learn from; default the sample's articles."),
    ] = None
    documents: Annotated[int, Option(min=1, help="At most this many documents of the public text.")] = 500
    report: Annotated[Path | None, Option(help="Also write a page with reconstructions side by side.")] = None

    def check(self) -> None:
        """Raises ValueError unless exactly one thing is audited, by attackers that exist."""
        if sum(map(bool, (self.compressor, self.store, self.embedder))) != 1:
            raise ValueError("Give one of --compressor NAME, --store FOLDER or --embedder NAME to audit.")
        if unknown := [name for name in self.attacker if name not in ATTACKERS]:
            raise ValueError(f"There is no attacker {unknown[0]!r}; there are {', '.join(ATTACKERS)}.")


@takes(AuditOptions)
def audit_command(asked: AuditOptions) -> None:
    """Measure what someone who copies stored slots, keys and values, or retrieval vectors can read."""
    asked.check()
    console = wide_console()
    reader = asked.load_reader()
    targets = list(find_targets(asked, reader))
    public, left_out = public_text(asked, targets)
    statistics, embedder = CorpusStatistics(public), _embedder()
    attackers = find_attackers(asked, reader, targets)
    for attacker in attackers:
        with console.status(f"{attacker.title}: learning from {len(public)} public passages ..."):
            attacker.learn(public)
    dataset = dataset_name(asked.store or asked.file)
    about = {"suite": "audit", "dataset": dataset, "public_passages": len(public), "public_left_out": left_out}
    about |= provenance(reader, asked.seed)
    guesses = {id(target): baseline(target, statistics, embedder, asked.seed) for target in targets}
    outcomes: list[Outcome] = [next(iter(guesses.values()))]
    for target in targets:
        for attacker in attackers:
            if all(attacker.reads(one) for one in target.stolen):
                with console.status(f"{target.label}: {attacker.title} ..."):
                    outcomes.append(audit(target, attacker, embedder, asked.seed))
    for outcome in outcomes:
        outcome.row = asked.tag(clean(about | outcome.row))
    asked.keep([outcome.row for outcome in outcomes], say=True)
    title = f"{dataset}, {len(targets[0].texts)} passages"
    console.print(rich_table(audit_table([outcome.row for outcome in outcomes], title)))
    sentences = [sentence(one, guesses[id(one.target)]) for one in worst(outcomes[1:])]
    for said in sentences:
        Console().print(said, highlight=False)
    if asked.report is not None:
        origin = f"{about['command']} ({about['device']}, {about['dtype']}, {about['date']}, commit {about['commit']})"
        typer.echo(f"Page: {write_page(asked.report, outcomes, sentences, [origin])}")


def find_targets(asked: AuditOptions, reader: Reader) -> Iterator[Target]:
    """What the options ask to audit."""
    if asked.store is not None:
        from ...adapters.store import LanceStore

        try:
            with LanceStore(asked.store, create=False, read_only=True) as store:
                yield from stored(store, reader, asked.limit)
        except StoreError as error:
            raise ValueError(str(error)) from error
        return
    records = find_records(asked.file, asked.half)
    texts = spread(list(dict.fromkeys(record.gold_text or record.passages[0] for record in records)), asked.limit)
    if asked.embedder is not None:
        yield vectors(load_embedder(asked.embedder), texts)
        return
    groups: dict[int, list] = {}
    for line in asked.lines(reader):
        groups.setdefault(id(line.compressor), []).append(line)
    for lines in groups.values():
        compressor = lines[0].compressor
        if compressor.query_aware:
            raise ValueError(
                f"{compressor.config.method} compresses for a question, and an audit has none; fill a store with its "
                "passages and audit that: --store FOLDER."
            )
        yield from compressed(compressor, [line.ratio for line in lines], texts)


def find_attackers(asked: AuditOptions, reader: Reader, targets: list[Target]) -> list[Attacker]:
    """The attackers that apply to at least one target. Raises ValueError if there is none."""
    fit = [
        cls
        for name, cls in ATTACKERS.items()
        if (not asked.attacker or name in asked.attacker) and any(cls.reads(target.stolen[0]) for target in targets)
    ]
    if not fit:
        have = ", ".join(dict.fromkeys(target.interface for target in targets))
        raise ValueError(f"None of the attackers {', '.join(asked.attacker or ATTACKERS)} reads {have}.")
    return [cls(reader) for cls in fit]


def public_text(asked: AuditOptions, targets: list[Target]) -> tuple[list[str], int]:
    """Public passages, without those that share twenty words in a row with an attacked one; and how many were left out."""
    held = HeldOut()
    for target in targets:
        for text in target.texts:
            held.add_passage(text)
    found = []
    for number, document in enumerate(read_documents(asked.public or SAMPLE_ARTICLES)):
        if number == asked.documents:
            break
        found += [cut_at_sentence(part, MAX_CHARS) for part in split_paragraphs(document) if len(part) >= 80]
    apart = [text for text in found if not held.has_passage(text)]
    if not apart:
        raise ValueError(
            f"{asked.public or 'The sample'} holds no public passage that is not attacked; give --public FILE."
        )
    return apart, len(found) - len(apart)


def _embedder() -> Embedder | None:
    """The embedder of the cosine; None if it is not installed."""
    try:
        return load_embedder(MINILM, "cpu")
    except (ImportError, ValueError):
        return None
