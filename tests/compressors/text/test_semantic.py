"""Semantic compression: topics by spectral clustering, and maximal marginal relevance inside each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zoo
from nutgraf.compressors import make_compressor
from nutgraf.compressors.encoders.embedder import load_embedder
from nutgraf.compressors.text.semantic import marginal_order, topic_shares, topics


def two_topics() -> torch.Tensor:
    torch.manual_seed(0)
    one, other = torch.eye(8, dtype=torch.double)[:2]
    rows = [one, one, one, other, other, other]
    noisy = torch.stack(rows) + 0.2 * torch.rand(6, 8, dtype=torch.double)
    return torch.nn.functional.normalize(noisy, dim=-1)


def test_topics_are_the_clusters_of_the_normalised_laplacian():
    vectors = two_topics()
    labels = topics(vectors, 2).tolist()
    assert labels[:3] == [labels[0]] * 3
    assert labels[3:] == [labels[3]] * 3
    assert labels[0] != labels[3]
    # the sign of the second eigenvector, computed by numpy, cuts two clusters alike
    v = vectors.numpy()
    n = len(v)
    weights = np.array([[max(0, v[i] @ v[j]) ** 2 * math.exp(-abs(i - j) / 20) for j in range(n)] for i in range(n)])
    degree = weights.sum(1)
    laplacian = np.eye(n) - weights / np.sqrt(degree[:, None] * degree[None])
    second = np.linalg.eigh(laplacian)[1][:, 1]
    assert [bool(s > 0) for s in second] in (
        [bool(x == labels[0]) for x in labels],
        [bool(x != labels[0]) for x in labels],
    )
    assert topics(vectors, 1).tolist() == [0] * 6
    assert sorted(topics(vectors, 6).tolist()) == list(range(6))


def test_sentences_of_a_topic_are_ordered_by_marginal_relevance():
    vectors = two_topics()
    left, order = list(range(6)), []
    mean = vectors.mean(0) / vectors.mean(0).norm()
    while left:

        def value(i: int) -> float:
            near = max([float(vectors[i] @ vectors[j]) for j in order], default=0.0)
            return 0.7 * float(vectors[i] @ mean) - 0.3 * max(near, 0.0)

        best = max(left, key=value)
        order.append(best)
        left.remove(best)
    assert marginal_order(vectors) == order


def test_every_topic_keeps_the_same_share():
    vectors, labels = two_topics(), torch.tensor([0, 0, 0, 1, 1, 1])
    sizes = torch.tensor([2.0, 4, 2, 10, 20, 10], dtype=torch.double)
    values = topic_shares(vectors, sizes, labels)
    for label in (0, 1):
        members = [i for i in range(6) if labels[i] == label]
        members.sort(key=lambda i: -float(values[i]))
        before = 0.0
        for i in members:
            assert float(values[i]) == pytest.approx(1 - before / float(sizes[labels == label].sum()), abs=1e-6)
            before += float(sizes[i])


def test_a_text_of_two_topics_keeps_a_sentence_of_each():
    reader = zoo.reader("llama")
    compressor = make_compressor(
        "semantic", reader, unit="sentence", topic_words=12, embedder=load_embedder("all-MiniLM-L6-v2", "cpu")
    )
    cats = "Cats are small furry animals. A cat hunts mice at night. Kittens drink the milk of the mother cat. "
    law = "The court passed a new law. Judges apply the law in court. Lawyers argue before the judge."
    (found,) = compressor.compress([cats + law], ratio=2)
    assert any(word in found.text for word in ("Cat", "cat"))
    assert any(word in found.text for word in ("law", "Judges", "judge"))
    assert found.n_tokens <= found.source_tokens / 2
