"""A budget of slots over passages: it is spent, its bounds hold, and better passages get more."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.adapters.llama_index.allocation import allocate, ratio_of
from nutgraf.compressors import make_compressor


def test_equal_scores_give_equal_ratios():
    assert allocate([40, 80, 120], [0.3, 0.3, 0.3], 60) == [10, 20, 30]
    assert allocate([40, 80, 120], [3, 2, 1], 60, temperature=1e6) == [10, 20, 30]


def test_better_passages_get_more():
    mild = allocate([100, 100, 100], [0.9, 0.5, 0.1], 60)
    sharp = allocate([100, 100, 100], [0.9, 0.5, 0.1], 60, temperature=0.2)
    assert mild[0] > mild[1] > mild[2] >= 1
    assert sharp[0] > mild[0]
    assert sum(mild) == sum(sharp) == 60
    # scores of another unit and origin say the same
    assert allocate([100, 100, 100], [9000, 5000, 1000], 60) == mild


def test_bounds_hold():
    assert allocate([100, 100], [1.0, 0.0], 60, temperature=0.1, lowest=2) == [50, 10]
    assert allocate([100, 100], [1.0, 0.0], 60, temperature=0.1, highest=5) == [40, 20]
    assert allocate([100, 0, 3], [1.0, 5.0, 0.0], 500) == [100, 0, 3]
    assert allocate([], [], 5) == []


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.floats(-5, 5)), max_size=8),
    st.integers(0, 900),
    st.floats(0.05, 20),
    st.sampled_from([1.0, 1.5, 2.0, 4.0]),
    st.sampled_from([8.0, 16.0, 100.0, math.inf]),
)
def test_the_budget_is_spent_and_never_passed(passages, budget, temperature, lowest, highest):
    tokens, scores = [n for n, _ in passages], [score for _, score in passages]
    least = [min(n, max(1, math.ceil(n / highest))) for n in tokens]
    if sum(least) > budget:
        with pytest.raises(ValueError, match="too small"):
            allocate(tokens, scores, budget, temperature=temperature, lowest=lowest, highest=highest)
        return
    slots = allocate(tokens, scores, budget, temperature=temperature, lowest=lowest, highest=highest)
    most = [max(int(n / lowest), few) for n, few in zip(tokens, least)]
    assert all(few <= k <= many for few, k, many in zip(least, slots, most))
    assert sum(slots) == min(budget, sum(most))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_ratios_give_the_slots_back(tokens, data):
    slots = data.draw(st.integers(1, tokens))
    ratio = ratio_of(tokens, slots)
    assert ratio >= 1
    assert math.ceil(tokens / ratio) == slots


def test_a_compressor_makes_the_slots_asked_for(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    compressor = make_compressor("mean-pool", reader, encoder="embeddings").eval()
    text = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
    tokens = len(reader.tokenize(text))
    for slots in range(1, tokens + 1):
        assert compressor.compress([text], ratio=ratio_of(tokens, slots))[0].slots == slots


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: allocate([1, 2], [0.5], 3), "One score a passage"),
        (lambda: allocate([5], [math.nan], 3), "finite scores"),
        (lambda: allocate([5], [1.0], 3, temperature=0), "temperature > 0"),
        (lambda: allocate([5], [1.0], 3, lowest=4, highest=2), "lowest <= highest"),
        (lambda: allocate([50, 50], [1.0, 0.0], 1), "too small"),
        (lambda: ratio_of(5, 6), "1 to 5 slots"),
        (lambda: ratio_of(5, 0), "1 to 5 slots"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
