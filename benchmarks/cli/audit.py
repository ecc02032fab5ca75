# ruff: noqa: RUF009 (`many` makes a dataclass field)
"""`nutgraf audit`: what someone who copies stored slots, keys and values, or vectors can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from ...adapters.store import StoreError
from ...compressors import Reader, load_compressor
from ...compressors.encoders.embedder import MINILM, Embedder, load_embedder
from ...recipes.data.corpus import read_documents, read_records, split_paragraphs
from ...recipes.data.overlap import HeldOut
from ...recipes.data.records import cut_at_sentence
from ..audit.answering import answering
from ..audit.attackers import ATTACKERS, Attacker
from ..audit.audit import Outcome, audit, baseline, sentence, worst
from ..audit.bag_of_words import BagOfWords
from ..audit.corpus_statistics import CorpusStatistics
from ..audit.defences import DEFENCES, defended
from ..audit.geia import GEIA, train, trained
from ..audit.page import audit_table, write_page
from ..audit.scores import words
from ..audit.targets import LEAKED, Target, compressed, spread, steal, stored, vectors
from ..audit.transfer import Transfer, transferred
from ..audit.vec2text import Vec2Text
from ..loading import SAMPLE_ARTICLES, CompressorSpec, dataset_name, find_records
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
    questions: Annotated[
        bool,
        Option(help="Attack the vectors of the file's questions, as a search keeps them; --public has questions, too."),
    ] = False
    attacker: Annotated[Names, Option(help=f"{', '.join(ATTACKERS)}; default all that apply.")] = many()
    defence: Annotated[Names, Option(help=f"Also attack what is stored after a defence: {DEFENCES}.")] = many()
    answers: Annotated[
        bool, Option(help="Also answer the file's questions from what is stored: what a defence costs.")
    ] = False
    limit: Annotated[
        int,
        Option(min=2, help="At most this many passages, evenly spread; of a store, a random sample per compressor."),
    ] = 100
    public: Annotated[
        Path | None,
        Option(help="Public text (.txt, .txt.xz) that attackers learn from; default the sample's articles."),
    ] = None
    documents: Annotated[int, Option(min=1, help="At most this many documents of the public text.")] = 500
    budget: Annotated[
        float | None,
        Option(min=0.01, help="Minutes to train a decoder for each target; run it again to train it further."),
    ] = None
    decoder: Annotated[Names, Option(help="Folder of a trained decoder, runs/audit/NAME/decoder.")] = many()
    runs: Annotated[Path, Option(help="Folder of the decoders' training runs.")] = Path("runs/audit")
    report: Annotated[Path | None, Option(help="Also write a page with reconstructions side by side.")] = None

    def check(self) -> None:
        """Raises ValueError unless exactly one thing is audited, by attackers that exist."""
        if sum(map(bool, (self.compressor, self.store, self.embedder))) != 1:
            raise ValueError("Give one of --compressor NAME, --store FOLDER or --embedder NAME to audit.")
        if self.questions and (not self.embedder or self.public is None):
            raise ValueError(
                "--questions attacks an embedder's vectors: give --embedder NAME and --public QUESTIONS.jsonl."
            )
        if self.answers and self.store:
            raise ValueError(
                "--answers needs questions about the passages, which a store does not hold; audit a compressor."
            )
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
    guesses = {id(target.texts): baseline(target, statistics, embedder, asked.seed) for target in targets}
    outcomes: list[Outcome] = [next(iter(guesses.values()))]
    records = find_records(asked.file, asked.half) if asked.answers else []
    learned: dict[str, Attacker] = {}
    for plain in targets:
        if plain.interface == "vector" and plain.victim and (asked.decoder or asked.budget):
            some = public[:LEAKED]
            plain.leaked = list(zip(some, steal(plain, some)))
        forms = [plain, *(defended(plain, name, asked.seed) for name in asked.defence)]
        costs = [answering(one, reader, records, asked.seed) for one in forms]
        for attacker in find_attackers(asked, reader, plain, left_out):
            if attacker.name in learned:
                attacker = learned[attacker.name]
            else:
                with console.status(f"{attacker.title}: learning from {len(public)} public passages ..."):
                    attacker.learn(public, plain)
                if not attacker.of_one_target:
                    learned[attacker.name] = attacker
            for target, cost in zip(forms, costs):
                with console.status(f"{target.label}: {attacker.title} ..."):
                    if attacker.of_one_defence and target is not plain:
                        attacker.learn(public, target)
                    outcomes.append(audit(target, attacker, embedder, asked.seed))
                    outcomes[-1].row |= cost
    if len(outcomes) == 1:
        have = ", ".join(dict.fromkeys(target.interface for target in targets))
        raise ValueError(
            f"No attacker reads {have} without training; give --budget MINUTES to train a decoder, or --decoder FOLDER."
        )
    dataset = dataset_name(asked.store or asked.file)
    about = {"suite": "audit", "dataset": dataset, "public_passages": len(public), "public_left_out": left_out}
    about |= {"attacked": "questions"} if asked.questions else {}
    about |= provenance(reader, asked.seed)
    for outcome in outcomes:
        outcome.row = asked.tag(clean(about | outcome.row))
    asked.keep([outcome.row for outcome in outcomes], say=True)
    title = f"{dataset}, {len(targets[0].texts)} {'questions' if asked.questions else 'passages'}"
    console.print(rich_table(audit_table([outcome.row for outcome in outcomes], title)))
    sentences = [sentence(one, guesses[id(one.target.texts)]) for one in worst(outcomes[1:])]
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
    kept = (r.question if asked.questions else r.gold_text or r.passages[0] for r in records)
    texts = list(dict.fromkeys(kept))
    texts = spread([text for text in texts if words(text)], asked.limit)
    if asked.embedder is not None:
        yield vectors(load_embedder(asked.embedder), texts)
        return
    for given in asked.compressor:
        spec = CompressorSpec.parse(given, asked.ratio)
        compressor = load_compressor(spec.name, reader)
        if compressor.query_aware:
            raise ValueError(
                f"{spec.name} compresses for a question, and an audit has none; fill a store with its passages and audit "
                "that: --store FOLDER."
            )
        yield from compressed(compressor, spec.ratios, texts, spec.name)


def find_attackers(asked: AuditOptions, reader: Reader, target: Target, left_out: int) -> Iterator[Attacker]:
    """The attackers of a target; a decoder is trained or loaded if the options say so.

    Raises ValueError if public text to train on holds attacked passages.
    """
    fit = [
        cls
        for name, cls in sorted(ATTACKERS.items())
        if (not asked.attacker or name in asked.attacker) and all(map(cls.reads, target.stolen))
    ]
    probed = target.victim is not None  # a probe learns from text that is compressed alike
    foreign = target.interface == "vector" and not probed
    if foreign and not (asked.decoder and target.leaked):
        typer.echo(
            "Not attacked: the stored retrieval vectors. Audit their embedder with --embedder NAME; or give another "
            "embedder's decoder, --decoder FOLDER, and attack fewer passages, --limit N: others stand for leaked ones."
        )
    for cls in fit:
        if issubclass(cls, GEIA) or (issubclass(cls, BagOfWords) and not probed):
            continue
        try:
            yield cls(reader)
        except ValueError as error:  # of a reader that it cannot attack
            if cls.name in asked.attacker:
                raise
            typer.echo(f"{cls.title} is left out: {error}")
    if not any(issubclass(cls, GEIA) for cls in fit):
        return
    found = trained(target, reader, asked.decoder)
    if found is None and Transfer in fit and target.leaked and (other := transferred(reader, asked.decoder)):
        yield other
        return
    if found is None and asked.budget is not None and not foreign:
        if left_out:
            raise ValueError(
                f"{left_out} passages of {asked.public or 'the sample articles'} are attacked, too; a decoder trained on "
                "them would know them by heart. Give other text with --public FILE."
            )
        found = train(
            target, reader, asked.public or SAMPLE_ARTICLES, asked.documents, asked.budget, asked.runs, asked.questions
        )
    if found is None:
        return
    if GEIA in fit:
        yield found
    if isinstance(target.victim, Embedder):
        if Vec2Text in fit:
            yield Vec2Text(reader, found.decoder, found.about, target.victim)
        if Transfer in fit and asked.defence:
            yield Transfer(reader, found.decoder, found.about, target.victim)


def public_text(asked: AuditOptions, targets: list[Target]) -> tuple[list[str], int]:
    """Public passages, without those that share twenty words in a row with an attacked one; and how many were left out.

    Of questions, those that are attacked, too, are left out.
    """
    held = HeldOut()
    for target in targets:
        for text in target.texts:
            (held.add_question if asked.questions else held.add_passage)(text)
    found = []
    if asked.questions and asked.public is not None:
        found = [record.question for record in read_records(asked.public, limit=asked.documents)]
    else:
        for document in islice(read_documents(asked.public or SAMPLE_ARTICLES), asked.documents):
            found += [cut_at_sentence(part, MAX_CHARS) for part in split_paragraphs(document) if len(part) >= 80]
    apart = [text for text in found if not (held.has_passage(text) or held.has_question(text))]
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
