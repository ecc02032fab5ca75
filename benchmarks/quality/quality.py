"""The quality suite: what the reader answers from compressed passages, between its two fixed lines.

`evaluate` runs every line of a table over the same records with the same prompt, and gives a row for each: the answers
against the references (EM, F1, containment, ROUGE-L, token-level EM), the reader's probability of the reference answer
(perplexity, KL to the full text), what the reader read, and how much of the full text's gain was kept.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...compressors import CompressedPassage, Compressor, Reader
from ...recipes.data.corpus import Record
from ...recipes.data.templates import Piece, question_prompt
from .. import metrics
from ..methods import Compressed, EqualBudget, Method, Shuffled, Stored, reader_of
from ..progress import progress_bar
from ..rows import Row, clean, provenance
from ..speed.first_token import first_token_times
from .scoring import Likelihood, answers, kl_divergence, likelihoods
from .source_hash import code_of


@dataclass(frozen=True)
class Line:
    """One line of the table over all records.

    Attributes:
        method: name of the method.
        ratio: compression ratio asked for, None where none is.
        predictions: the reader's answer to each record.
        scores: per record `em`, `f1`, `containment`, `rouge_l`, `token_em`, `nll`, `kl`, `answer_tokens`,
            `reader_tokens`, `source_tokens`, `slots`, each an array `[records]`.
        row: the row for the results file.
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
        dataset: name that the rows carry.
        max_new_tokens: longest answer.
        batch_size: prompts read at a time.
        beta: weight of recall in ROUGE-L.
        seed: seed of the baselines, the shuffled control and the bootstrap.
        likelihood: also measure perplexity and KL of the reference answers.
        ttft: questions whose time to the first token is measured, slots in memory; 0 measures none.
        progress: show a progress bar.
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
) -> list[Line]:
    """Measure every method over the same records.

    The first method must be the full text and the second no context (`methods.lines` builds such a list): all others
    are judged between these two. Records whose full text the reader has no room for are left out of every line, and
    counted in the rows as `skipped`.

    Args:
        on_line: called with each line as soon as it is measured.

    Raises:
        ValueError: if no record is left, a record has no reference answer, or the fixed lines do not lead.
    """
    if [method.name for method in methods[:2]] != ["full", "none"]:
        raise ValueError('The first two methods must be the lines "full" and "none"; methods.lines puts them there.')
    kept = readable(reader, records, settings.max_new_tokens)
    references = [reader.tokenize(" " + record.answers[0]) for record in kept]
    sources = np.array([sum(map(len, reader.tokenize_batch(list(r.passages)))) for r in kept])
    full_prompts = [question_prompt(list(record.passages), record.question) for record in kept]
    found: list[Line] = []
    full: list[Likelihood] | None = None
    with progress_bar(settings.progress) as bar:
        for method in methods:
            task = bar.add_task(label(method), total=len(kept) * (1 + settings.likelihood))
            advance = functools.partial(bar.advance, task)
            contexts = method.contexts(reader, kept)
            prompts = [question_prompt(pieces, record.question) for pieces, record in zip(contexts, kept)]
            reads = reader_of(method, reader)
            predictions = answers(
                reads, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, advance=advance
            )
            scores = _text_scores(reader, predictions, kept, references, settings.beta)
            scores["reader_tokens"] = np.array([reads.length(prompt) for prompt in prompts])
            scores["slots"] = np.array([sum(_size(reader, piece) for piece in pieces) for pieces in contexts])
            scores["source_tokens"] = sources
            if settings.likelihood:
                likely = likelihoods(reads, prompts, references, batch_size=settings.batch_size, advance=advance)
                full = likely if full is None else full
                scores["nll"] = np.array([-float(item.log_probs.sum()) for item in likely])
                scores["answer_tokens"] = np.array([len(item.log_probs) for item in likely])
                scores["kl"] = np.array([kl_divergence(reader, a, b) for a, b in zip(full, likely)])
            row = _row(method, scores, found, kept, settings)
            row |= _about(method) | {"questions": questions_hash(kept), "skipped": len(records) - len(kept)}
            if isinstance(method, Compressed):
                sizes = [
                    piece.nbytes for pieces in contexts for piece in pieces if isinstance(piece, CompressedPassage)
                ]
                row["bytes_per_passage"] = sum(sizes) / max(1, len(sizes))
            if isinstance(method, Stored):
                row |= _stored(method, predictions, scores, found, settings.seed)
            if settings.ttft:
                row |= _first_token(method, kept, reads, prompts, reader, full_prompts, settings.ttft)
            compressor = compressor_of(method)
            row |= provenance(reader, settings.seed, compressor) | {"code": code_of(compressor)}
            found.append(Line(method.name, method.ratio, predictions, scores, clean(row)))
            on_line(found[-1])
    return found


def _first_token(
    method: Method,
    records: Sequence[Record],
    reads: Reader,
    prompts: Sequence[list[Piece]],
    reader: Reader,
    full: Sequence[list[Piece]],
    requests: int,
) -> Row:
    fresh: Callable[[int], list[Piece]] | None = None
    if isinstance(method, Compressed) and method.query_aware:
        asking = method

        def fresh(i: int) -> list[Piece]:
            return question_prompt(asking.fresh(records[i]), records[i].question)

    ours, theirs = first_token_times(reads, prompts, reader, full, requests=requests, fresh=fresh)
    row: Row = {"ttft_ms": ours, "ttft_full_ms": theirs, "ttft_speedup": theirs / ours}
    return row | ({} if fresh is None else {"ttft_compresses": True})


def questions_hash(records: Sequence[Record]) -> str:
    """Short hash of questions and their passages: rows of equal hash are paired question by question."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.question, *record.passages):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(b"\1")
    return digest.hexdigest()[:10]


def readable(reader: Reader, records: Sequence[Record], max_new_tokens: int) -> list[Record]:
    """The records whose full text and answer fit the reader's positions.

    Raises ValueError if none is left, or if a record has no reference answer.
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


def label(method: Method) -> str:
    """What a method is called on a progress bar: its name, the ratio asked for, and whose budget it has."""
    asked = f" {method.ratio:g}x" if method.ratio else ""
    return method.name + (f" (budget of {method.of.name}{asked})" if isinstance(method, EqualBudget) else asked)


def _text_scores(
    reader: Reader, predictions: Sequence[str], records: Sequence[Record], references: Sequence[list[int]], beta: float
) -> dict[str, np.ndarray]:
    pairs = list(zip(predictions, records))
    guesses = reader.tokenize_batch([" " + guess for guess in predictions])
    return {
        "em": np.array([metrics.exact_match(guess, r.answers) for guess, r in pairs]),
        "f1": np.array([metrics.f1(guess, r.answers) for guess, r in pairs]),
        "containment": np.array([metrics.containment(guess, r.answers) for guess, r in pairs]),
        "rouge_l": np.array([metrics.rouge_l_answer(guess, r.answers, beta) for guess, r in pairs]),
        "token_em": np.array([metrics.token_exact_match(guess, ids) for guess, ids in zip(guesses, references)]),
    }


def _size(reader: Reader, piece: Piece) -> int:
    return piece.slots if isinstance(piece, CompressedPassage) else len(reader.tokenize(piece))


def _row(
    method: Method, scores: dict[str, np.ndarray], found: Sequence[Line], records: Sequence[Record], settings: Settings
) -> Row:
    row: Row = {
        "suite": "quality",
        "dataset": settings.dataset,
        "passages": round(float(np.mean([len(record.passages) for record in records])), 2),
        "method": method.name,
        "ratio_asked": method.ratio,
        "ratio": metrics.compression_ratio(int(scores["source_tokens"].sum()), int(scores["slots"].sum())),
        "rate": metrics.compression_rate(int(scores["source_tokens"].sum()), int(scores["slots"].sum())),
        "reader_tokens": float(scores["reader_tokens"].mean()),
        "n": len(records),
        **{name: float(scores[name].mean()) for name in ("em", "f1", "containment", "rouge_l", "token_em")},
        "rouge_beta": settings.beta,
        "max_new_tokens": settings.max_new_tokens,
    }
    row["f1_each"] = [int(score) if score in (0, 1) else round(float(score), 3) for score in scores["f1"]]
    row["f1_ci_low"], row["f1_ci_high"] = metrics.bootstrap_mean(scores["f1"], seed=settings.seed)
    if isinstance(method, EqualBudget):
        row["budget_of"] = method.of.name
    if "nll" in scores:
        row["answer_ppl"] = metrics.perplexity_per_token([-scores["nll"].sum() / scores["answer_tokens"].sum()])
        row["answer_ppl_product"] = metrics.perplexity_product([-scores["nll"].mean()])
        row["kl_to_full"] = float(scores["kl"].mean())
    if len(found) >= 2:
        full, none = found[0].scores["f1"], found[1].scores["f1"]
        row |= metrics.recovered(scores["f1"], none, full, seed=settings.seed)
    return row


def _about(method: Method) -> Row:
    """What kind of line it is: what is read, whether the question was seen, whether the reader was tuned."""
    compressor = compressor_of(method)
    if compressor is None or isinstance(method, EqualBudget):
        return {"interface": "text"}
    facts: Row = {"interface": compressor.interface}
    compressed = method.of if isinstance(method, Shuffled | Stored) else method
    if getattr(compressed, "query_aware", False):
        facts["query_aware"] = True
    if compressor.reader is not compressor.base_reader:
        facts["reader_tuned"] = True
    return facts


def _stored(
    method: Stored, predictions: Sequence[str], scores: dict[str, np.ndarray], found: Sequence[Line], seed: int
) -> Row:
    """What a stored line adds: its precision and bytes and, question by question, what changed against the slots as made."""
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


def compressor_of(method: Method) -> Compressor | None:
    """The compressor that a line is about, its own or that of the method whose control or budget it is."""
    if isinstance(method, EqualBudget | Shuffled | Stored):
        return compressor_of(method.of)
    return getattr(method, "compressor", None)
