"""Prompt-SAW: keeps the relations (subject, verb, object) that a question asks for, or that nothing before has said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.config import CompressorConfig, setting
from ..core.hidden import hide
from ..core.units import Span, split_units
from ..encoders.embedder import MINILM, Embedder, load_embedder
from ..fidelity.questions import AUX, word_set
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import PrunerConfig, SentencePruner, SentenceScores, sentence_index, sentence_spans
from .scoring import TokenScores

_CLAUSE = re.compile(r"[;:](?=\s)|,(?=\s+(?:and|but|while|which|who|whom|whose|because|although|where|when|so|or)\b)")
_WORD = re.compile(r"[^\W_]+(?:['’.\-][^\W_]+)*")
_VERB = re.compile(r"[a-z]{3,}(?:ed|ing)$")
# Frequent verbs without a regular ending.
_IRREGULAR = word_set(
    "be been being am become becomes became begin begins began bring brought build built came come comes drew drove fell felt "
    "fight fought find found gave get gets give gives go goes went got grew grow grows held keep kept knew know known knows "
    "lead leads led left leave lie lies lay lost made make makes mean means meant met paid put ran rose run runs said saw say "
    "says sang see seen sees sent set shot show shown shows sold spent spoke stand stands stood take taken takes taught tell "
    "tells told took understood won wore write writes written wrote let cannot"
)
_BESIDE = word_set("not never no also often only always still already n't")
_OBJECT = 8  # most words of an object
_SUBJECT = 8  # most words of a subject
_ROWS = 512  # relations compared to all before them at a time
_OUTSIDE = 4.0  # more than the values of two relations can differ by


@dataclass
class PromptSAWConfig(PrunerConfig):
    """Settings of Prompt-SAW."""

    method: ClassVar[str] = "prompt-saw"
    title: ClassVar[str] = "Prompt-SAW"
    cost: ClassVar[str] = "scores"
    unpublished: ClassVar[str] = "the paper extracts relations by OpenIE and a language model"

    query_aware: bool = setting(
        True, "rank relations by the question; otherwise drop those that repeat others", kw_only=True
    )
    embedder: str = setting(MINILM, "sentence-transformers model that embeds relations", kw_only=True)


@register_compressor
class PromptSAWCompressor(SentencePruner):
    """Keeps relations of a text within a budget (Prompt-SAW, arXiv 2404.00489).

    A relation is the part of a clause from the words before its verb to the words after it, found by word lists and endings; a
    clause without a verb is a relation as a whole. With ``query_aware`` a relation's value is its cosine to the question.
    Otherwise it is 1 minus the largest cosine to an earlier relation. Words outside of relations go first.

    The paper extracts relations by OpenIE and compares without a question to the *kept* relations alone. No training.

    Args:
        config: the settings.
        reader: the reader; the budget counts its tokens.
        embedder: an embedder that is already loaded, instead of ``config.embedder``.
    """

    config_class: ClassVar[type[CompressorConfig]] = PromptSAWConfig
    training_free = True
    config: PromptSAWConfig
    embedder: Embedder

    def __init__(self, config: PromptSAWConfig, reader: Reader, *, embedder: Embedder | None = None) -> None:
        super().__init__(config, reader)
        hide(self, "embedder", embedder or load_embedder(config.embedder, reader.device))

    def identity_parts(self) -> list[Any]:
        """Reader and embedder."""
        return [*super().identity_parts(), self.embedder.fingerprint]

    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """The value of each clause is that of its relation; words say whether they are part of it."""
        clauses = [clause_spans(text) for text in texts]
        relations = [[relation(text, span) for span in cuts] for text, cuts in zip(texts, clauses)]
        found = self.embedder.means([text[a:b] for text, parts in zip(texts, relations) for a, b in parts])
        asked = self.embedder.means([query or "" for query in queries]) if self.query_aware else None
        out = []
        for i, vectors in enumerate(found.split([len(parts) for parts in relations])):
            values = novelty(vectors) if asked is None else vectors @ asked[i]
            out.append(SentenceScores(clauses[i], values, _inside(texts[i], relations[i])))
        return out

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The score of each word: its relation's, or less than that of every relation for a word outside."""
        asked = list(queries or [None] * len(texts))
        self.check_questions(asked)
        out = []
        for found in self.score_sentences(texts, asked):
            words = found.words or TokenScores([], [], torch.zeros(0))
            of_clause = found.values[sentence_index([a for a, _ in words.offsets], found.spans)]
            out.append(TokenScores([], words.offsets, of_clause - _OUTSIDE * (1 - words.nll)))
        return out


def clause_spans(text: str) -> list[Span]:
    """``(start, end)`` characters of the clauses of a text, without gaps."""
    cuts = {a for a, _ in sentence_spans(text)} | {match.end() for match in _CLAUSE.finditer(text)}
    borders = sorted(cut for cut in cuts if 0 < cut < len(text))
    return list(zip([0, *borders], [*borders, len(text)])) if text else []


def relation(text: str, clause: Span) -> Span:
    """``(start, end)`` characters of a clause's subject, verb and object; the whole clause without a verb."""
    words = [(m.start() + clause[0], m.end() + clause[0]) for m in _WORD.finditer(text[clause[0] : clause[1]])]
    verbs = [i for i, (a, b) in enumerate(words) if _is_verb(text[a:b])]
    if not verbs:
        return clause
    first = last = verbs[0]
    while last + 1 < len(words) and (last + 1 in verbs or text[slice(*words[last + 1])].lower() in _BESIDE):
        last += 1
    start, end = max(0, first - _SUBJECT), min(len(words), last + 1 + _OBJECT)
    return (words[start][0] if start else clause[0]), (words[end - 1][1] if end < len(words) else clause[1])


def _is_verb(word: str) -> bool:
    return word.lower() in AUX | _IRREGULAR or bool(_VERB.match(word))


def _inside(text: str, relations: Sequence[Span]) -> TokenScores:
    """1 for each word that begins in a relation, else 0."""
    words = split_units(text, "word")
    covered = torch.zeros(len(text) + 1)
    for a, b in relations:
        covered[a:b] = 1
    # White space belongs to the word after it.
    starts = [b - len(text[a:b].lstrip()) for a, b in words]
    return TokenScores([], words, covered[torch.tensor(starts, dtype=torch.long)])


def novelty(vectors: Tensor) -> Tensor:
    """``[n]``: 1 minus the largest cosine of each unit vector to one before it; 1 for the first."""
    nearest = vectors.new_zeros(len(vectors))
    for a in range(0, len(vectors), _ROWS):
        rows = vectors[a : a + _ROWS]
        nearest[a : a + _ROWS] = (rows @ vectors[: a + _ROWS].T).tril(a - 1).amax(1).clamp(min=0)
    return 1 - nearest
