"""Prompt-SAW: relations by rule, and their value for a question or against repetition."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import make_compressor
from nutgraf.compressors.encoders.embedder import load_embedder
from nutgraf.compressors.text.prompt_saw import clause_spans, novelty, relation

TEXT = (
    "Marie Curie was born in Warsaw, and she later won two Nobel Prizes. No prize in 1905. "
    "The treaty was not signed by the small kingdom in the far north of the continent during the long cold winter."
)


@pytest.fixture(scope="module")
def embedder():
    return load_embedder("all-MiniLM-L6-v2", "cpu")


def relations(text: str) -> list[str]:
    return [text[slice(*relation(text, span))].strip() for span in clause_spans(text)]


def test_relations_are_subject_verb_and_object():
    assert relations(TEXT) == [
        "Marie Curie was born in Warsaw,",
        "and she later won two Nobel Prizes.",
        "No prize in 1905.",
        "The treaty was not signed by the small kingdom in the far north",
    ]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80))
def test_clauses_cover_any_text_and_hold_their_relations(text):
    spans = clause_spans(text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(a <= relation(text, (a, b))[0] <= relation(text, (a, b))[1] <= b for a, b in spans)


def test_values_are_cosines_to_the_question_and_words_outside_go_first(embedder):
    reader = zoo.reader("llama")
    compressor = make_compressor("prompt-saw", reader, embedder=embedder)
    question = "Which prizes did Curie win?"
    (found,) = compressor.score_sentences([TEXT], [question])
    vectors = torch.stack([embedder.embed([r])[0] for r in (question, *relations(TEXT))])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    assert torch.allclose(found.values, vectors[1:] @ vectors[0], atol=1e-4)
    (tokens,) = compressor.score([TEXT], [question])
    outside = TEXT.index(" of the continent")
    inside = [float(v) for (a, _), v in zip(tokens.offsets, tokens.nll) if a < outside]
    assert max(float(v) for (a, _), v in zip(tokens.offsets, tokens.nll) if a >= outside) < min(inside)
    (kept,) = compressor.compress([TEXT], question, ratio=4)
    assert "Nobel Prizes" in kept.text


def test_without_a_question_a_repeated_relation_is_worth_nothing(embedder):
    vectors = torch.nn.functional.normalize(torch.randn(5, 6), dim=-1)
    vectors[3] = vectors[1]
    want = [1.0] + [1 - max(0.0, *(float(vectors[i] @ vectors[j]) for j in range(i))) for i in range(1, 5)]
    assert novelty(vectors).tolist() == pytest.approx(want, abs=1e-4)
    compressor = make_compressor("prompt-saw", zoo.reader("llama"), embedder=embedder, query_aware=False)
    twice = "The treaty was signed in 1648. The treaty was signed in 1648. Rivers carry sediment to the sea."
    (kept,) = compressor.compress([twice], ratio=1.4)
    assert kept.text.count("signed") == 1
    assert "sediment" in kept.text
