"""The quality suite: answers from compressed passages, between the full text and no context.

`evaluate` runs every line of a table over the same records with the same prompt and gives a row for each: answers against
the references, the reader's probability of the reference answer, tokens read, and the share of the full text's gain.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...compressors import CompressedPassage, Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece, question_prompt
from .. import metrics
from ..methods import Compressed, EqualBudget, Method, Stored, prompt_size
from ..progress import progress_bar
from ..rows import Row, clean, provenance
from ..speed.timing import first_token_times
from .scoring import Likelihood, answers, kl_divergence, likelihoods, score_each
from .source_hash import code_of


@dataclass(frozen=True)
class Line:
    """One line of the table over all records.

    Attributes:
        ratio: Compression ratio asked for, if any.
        predictions: The reader's answer to each record.
        scores: Arrays `[records]`: `em`, `f1`, `containment`, `rouge_l`, `token_em`, `nll`, `kl`, `answer_tokens`,
            `reader_tokens`, `source_tokens`, `slots`.
        row: The row for the results file.
    """

    method: str
    ratio: float | None
    predictions: list[str]
    scores: dict[str, np.ndarray]
    row: Row


@dataclass(frozen=True)
class Settings:
    """How a table is measured.

    Attributes:
        dataset: Name in the rows.
        max_new_tokens: Longest answer.
        batch_size: Prompts read at a time.
        beta: Weight of recall in ROUGE-L.
        seed: Of baselines, the shuffled control and the bootstrap.
        likelihood: Also measure perplexity and KL of the reference answers.
        ttft: Questions to time to the first token, slots in memory.
        progress: Show a progress bar.
    """

    dataset: str = ""
    max_new_tokens: int = 24
    batch_size: int = 16
    beta: float = 1.0
    seed: int = 0
    likelihood: bool = True
    ttft: int = 0
    progress: bool = True


def evaluate(
    reader: Reader,
    methods: Sequence[Method],
    records: Sequence[Record],
    settings: Settings,
    on_line: Callable[[Line], None] = lambda line: None,
    known: Sequence[Line] = (),
) -> list[Line]:
    """Measure every method over the same records.

    The first method must be the full text and the second no context (`methods.lines` makes such a list). Records whose full
    text does not fit into the reader are left out of every line and counted as `skipped`.

    Args:
        on_line: Called with each line as soon as it is measured.
        known: The two fixed lines, if they were measured over these records before; not with `likelihood`.

    Raises:
        ValueError: If no record is left, a record has no reference answer, or the fixed lines are not first.
    """
    if known and settings.likelihood:
        raise ValueError("KL is measured in turns with the full text; give known lines with likelihood=False only.")
    if [*(line.method for line in known), *(method.name for method in methods)][:2] != ["full", "none"]:
        raise ValueError('The first two methods must be the lines "full" and "none"; methods.lines puts them there.')
    kept = readable(reader, records, settings.max_new_tokens)
    references = [reader.tokenize(" " + record.answers[0]) for record in kept]
    sources = np.array([sum(map(len, reader.tokenize_batch(list(r.passages)))) for r in kept])
    full_prompts = [question_prompt(list(record.passages), record.question) for record in kept]
    found = list(known)
    full: list[Likelihood] | None = None
    with progress_bar(settings.progress) as bar:
        for method in methods:
            task = bar.add_task(method.label, total=len(kept) * (1 + settings.likelihood))
            advance = functools.partial(bar.advance, task)
            contexts = method.contexts(reader, kept)
            prompts = [question_prompt(pieces, record.question) for pieces, record in zip(contexts, kept)]
            reads = method.reads(reader)
            predictions = answers(
                reads, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, advance=advance
            )
            scores = _text_scores(reader, predictions, kept, references, settings.beta)
            scores["reader_tokens"] = np.array([prompt_size(reads, prompt) for prompt in prompts])
            scores["slots"] = np.array([sum(_size(reader, piece) for piece in pieces) for pieces in contexts])
            scores["source_tokens"] = sources
            if settings.likelihood:
                likely = likelihoods(reads, prompts, references, batch_size=settings.batch_size, advance=advance)
                full = likely if full is None else full
                scores["nll"] = np.array([-float(item.log_probs.sum()) for item in likely])
                scores["answer_tokens"] = np.array([len(item.log_probs) for item in likely])
                scores["kl"] = np.array([kl_divergence(reader, a, b) for a, b in zip(full, likely)])
            row = _row(reader, method, scores, found, kept, settings)
            row |= method.about() | {"questions": questions_hash(kept), "skipped": len(records) - len(kept)}
            if sizes := [_nbytes(piece) for pieces in contexts for piece in pieces]:
                row["bytes_per_passage"] = sum(sizes) / len(sizes)
            row |= _survival(contexts, kept)
            if isinstance(method, Stored):
                row |= _stored(method, predictions, scores, found, settings.seed)
            if settings.ttft:
                asked = isinstance(method, Compressed) and method.query_aware
                fresh = functools.partial(method.fresh_prompt, kept) if asked else None  # type: ignore[attr-defined]
                ours, theirs = first_token_times(
                    reads, prompts, reader, full_prompts, requests=settings.ttft, fresh=fresh
                )
                row |= {"ttft_ms": ours, "ttft_full_ms": theirs, "ttft_speedup": theirs / ours}
                row |= {} if fresh is None else {"ttft_compresses": True}
            row["code"] = code_of(method.compressor)
            found.append(Line(method.name, method.ratio, predictions, scores, clean(row)))
            on_line(found[-1])
    return found[len(known) :]


def answer_prompts(reader: Reader, prompts: Sequence[list[Piece]], settings: Settings, title: str) -> list[str]:
    """The reader's answers, with a progress bar."""
    with progress_bar(settings.progress and bool(prompts)) as bar:
        advance = functools.partial(bar.advance, bar.add_task(title, total=len(prompts)))
        size = settings.batch_size
        return answers(reader, prompts, max_new_tokens=settings.max_new_tokens, batch_size=size, advance=advance)


def questions_hash(records: Sequence[Record]) -> str:
    """Short hash of questions and passages; rows of equal hash are paired question by question."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.question, *record.passages):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(b"\1")
    return digest.hexdigest()[:10]


def readable(reader: Reader, records: Sequence[Record], max_new_tokens: int) -> list[Record]:
    """The records whose full text and answer fit into the reader.

    Raises ValueError if none is left, or a record has no reference answer.
    """
    if unanswered := [record.id or record.question for record in records if not record.answers]:
        raise ValueError(f"{len(unanswered)} records have no reference answer, the first is {unanswered[0]!r}.")
    room = reader.max_positions
    kept = []
    for record in records:
        more = max(max_new_tokens, len(reader.tokenize(" " + record.answers[0])) + 1)
        if room is None or reader.length(question_prompt(record.passages, record.question)) + more <= room:
            kept.append(record)
    if not kept:
        raise ValueError(f"None of {len(records)} records can be measured: they are too long for {room} positions.")
    return kept


def _text_scores(
    reader: Reader, predictions: Sequence[str], records: Sequence[Record], references: Sequence[list[int]], beta: float
) -> dict[str, np.ndarray]:
    found = score_each(predictions, records)
    found["rouge_l"] = np.array([metrics.rouge_l_answer(g, r.answers, beta) for g, r in zip(predictions, records)])
    guesses = reader.tokenize_batch([" " + guess for guess in predictions])
    found["token_em"] = np.array([metrics.token_exact_match(guess, ids) for guess, ids in zip(guesses, references)])
    return found


def _survival(contexts: Sequence[Sequence[Piece]], records: Sequence[Record]) -> Row:
    """Mean shares of the passages' numbers and names that a line made of text still holds; nothing for other lines."""
    texts = [[piece if isinstance(piece, str) else piece.text for piece in pieces] for pieces in contexts]
    if any(text is None for pieces in texts for text in pieces):
        return {}
    row: Row = {}
    for kind in ("numbers", "names"):
        shares = [metrics.surviving(kind, r.passages, [t or "" for t in pieces]) for r, pieces in zip(records, texts)]
        if known := [share for share in shares if share is not None]:
            row[f"kept_{kind}"] = float(np.mean(known))
    return row


def _size(reader: Reader, piece: Piece) -> float:
    if not isinstance(piece, CompressedPassage):
        return len(reader.tokenize(piece))
    return piece.source_tokens / piece.ratio if piece.ragged else piece.slots


def _nbytes(piece: Piece) -> int:
    return piece.nbytes if isinstance(piece, CompressedPassage) else len(piece.encode("utf-8", "surrogatepass"))


def head(reader: Reader, method: Method, records: Sequence[Record], settings: Settings) -> Row:
    """What a row is about, without figures."""
    return {
        "suite": "quality",
        "dataset": settings.dataset,
        "passages": round(float(np.mean([len(record.passages) for record in records])), 2),
        "method": method.name,
        "ratio_asked": method.ratio,
        "n": len(records),
        **provenance(reader, settings.seed, method.compressor),
    }


def _row(
    reader: Reader,
    method: Method,
    scores: dict[str, np.ndarray],
    found: Sequence[Line],
    records: Sequence[Record],
    settings: Settings,
) -> Row:
    lengths = int(scores["source_tokens"].sum()), round(float(scores["slots"].sum()))
    means = ("reader_tokens", "em", "f1", "containment", "rouge_l", "token_em")
    row = head(reader, method, records, settings) | {name: float(scores[name].mean()) for name in means}
    row |= {"ratio": metrics.compression_ratio(*lengths), "rate": metrics.compression_rate(*lengths)}
    row |= {"rouge_beta": settings.beta, "max_new_tokens": settings.max_new_tokens}
    row["f1_each"] = [int(score) if score in (0, 1) else round(float(score), 3) for score in scores["f1"]]
    row["f1_ci_low"], row["f1_ci_high"] = metrics.bootstrap_mean(scores["f1"], seed=settings.seed)
    if isinstance(method, EqualBudget):
        row["budget_of"] = method.of.name
    if "nll" in scores:
        row["answer_ppl"] = metrics.perplexity_per_token([-scores["nll"].sum() / scores["answer_tokens"].sum()])
        row["answer_ppl_product"] = metrics.perplexity_product([-scores["nll"].mean()])
        row["kl_to_full"] = float(scores["kl"].mean())
    if len(found) >= 2:
        row |= metrics.recovered(scores["f1"], found[1].scores["f1"], found[0].scores["f1"], seed=settings.seed)
    return row


def _stored(
    method: Stored, predictions: Sequence[str], scores: dict[str, np.ndarray], found: Sequence[Line], seed: int
) -> Row:
    """Precision and bytes of a stored line and, question by question, the change vs. the slots as made."""
    row: Row = {"store_precision": method.precision, "stored_of": method.of.name, "bytes_per_passage": method.nbytes}
    if method.encoding.quantize is not None:
        row["store_group"] = method.encoding.group
    made = next((line for line in found if (line.method, line.ratio) == (method.of.name, method.ratio)), None)
    if made is not None:
        change = scores["f1"] - made.scores["f1"]
        row["same_answers"] = float(np.mean([a == b for a, b in zip(predictions, made.predictions)]))
        row["f1_change"] = float(change.mean())
        row["f1_change_ci_low"], row["f1_change_ci_high"] = metrics.bootstrap_mean(change, seed=seed)
    return row
