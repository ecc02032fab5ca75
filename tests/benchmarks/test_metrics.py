"""Metrics against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from nutgraf.benchmarks import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("  an   apple a day ", "apple day"),
        ("Theatre", "theatre"),  # an article inside a word stays
        ("rock'n'roll", "rocknroll"),
        ("the", ""),
        ("Ørsted–Lenz", "ørsted–lenz"),  # only ASCII punctuation goes, as in SQuAD's own script
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert metrics.normalize(text) == normal


def test_exact_match_takes_the_best_answer() -> None:
    assert metrics.exact_match("The BBC", ["ITV", "BBC"]) == 1.0
    assert metrics.exact_match("BBC One", ["ITV", "BBC"]) == 0.0


def test_surviving_numbers_and_names() -> None:
    source = "Marie Curie won 2 prizes, in 1903 and 1911, and paid 3.5 % of 1903."
    assert metrics.surviving("numbers", [source], ["won 2; 1903", "3.51 and 21911"]) == pytest.approx(2 / 4)
    assert metrics.surviving("names", [source], ["Curie, Marie"]) == 0
    assert metrics.surviving("names", [source], [source]) == 1
    assert metrics.surviving("numbers", ["none here"], [""]) is None


def test_f1_by_hand() -> None:
    # {george, stigler, economist} against {george, stigler}: precision 2/3, recall 1, F1 = 0.8
    assert metrics.f1("George Stigler, economist", ["George Stigler"]) == pytest.approx(0.8)
    # bags: {x, x} against {x}: one common word, 2 * 1 / 3
    assert metrics.f1("x x", ["x"]) == pytest.approx(2 / 3)
    assert metrics.f1("", ["the"]) == 1.0
    assert metrics.f1("", ["word"]) == 0.0


def test_containment_is_by_whole_words() -> None:
    assert metrics.containment("It was 1941 in Rome", ["rome"]) == 1.0
    assert metrics.containment("He sang a romance", ["rome", "roman"]) == 0.0
    assert metrics.containment("anything", ["the"]) == 0.0


def test_token_exact_match_is_positional() -> None:
    # eq. 12: positions 1 and 3 of four agree
    assert metrics.token_exact_match([5, 9, 7], [5, 6, 7, 8]) == pytest.approx(0.5)
    # one inserted token shifts everything
    assert metrics.token_exact_match([0, 5, 6, 7], [5, 6, 7]) == 0.0
    # tokens after the reference's end do not count
    assert metrics.token_exact_match([5, 6, 7, 8, 9], [5, 6]) == 1.0
    with pytest.raises(ValueError, match="at least one token"):
        metrics.token_exact_match([1], [])


def test_longest_common_subsequence() -> None:
    assert metrics.longest_common_subsequence("ABCBDAB", "BDCABA") == 4
    assert metrics.longest_common_subsequence([], [1]) == 0


def test_rouge_l_by_hand() -> None:
    reference = ["police", "killed", "the", "gunman"]
    guess = ["police", "kill", "the", "gunman", "now"]
    # LCS = police the gunman = 3; R = 3/4, P = 3/5, F1 = 2 * .45 / 1.35 = 2/3
    assert metrics.rouge_l(guess, reference) == pytest.approx(2 / 3)
    # beta = 2: 5 * .45 / (4 * .6 + .75) = 2.25 / 3.15
    assert metrics.rouge_l(guess, reference, beta=2) == pytest.approx(2.25 / 3.15)
    # beta = 0 is precision alone
    assert metrics.rouge_l(guess, reference, beta=0) == pytest.approx(0.6)
    assert metrics.rouge_l([], reference) == 0.0
    assert metrics.rouge_l_answer("the police killed", ["nothing", "Police killed."]) == 1.0
    with pytest.raises(ValueError, match="beta"):
        metrics.rouge_l(guess, reference, beta=-1)


def test_perplexity_both_ways() -> None:
    log_probs = [math.log(1 / 2), math.log(1 / 8)]
    assert metrics.perplexity_product(log_probs) == pytest.approx(16)
    assert metrics.perplexity_per_token(log_probs) == pytest.approx(4)
    assert metrics.perplexity_product([-1e6]) == math.inf
    with pytest.raises(ValueError, match="at least one token"):
        metrics.perplexity_product([])


def test_compression() -> None:
    assert metrics.compression_rate(128, 8) == pytest.approx(1 / 16)
    assert metrics.compression_ratio(128, 8) == pytest.approx(16)
    assert metrics.compression_ratio(0, 0) == 1.0
    assert metrics.compression_ratio(5, 0) == math.inf
    with pytest.raises(ValueError, match="negative"):
        metrics.compression_rate(-1, 0)


def test_bootstrap_mean_is_seeded_and_close_to_theory() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.2, 400)
    low, high = metrics.bootstrap_mean(values, seed=1)
    assert (low, high) == metrics.bootstrap_mean(values, seed=1)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert metrics.bootstrap_mean([0.3]) == (0.3, 0.3)
    with pytest.raises(ValueError, match="at least one value"):
        metrics.bootstrap_mean([])


def test_bootstrap_blocks_do_not_change_the_draw_count() -> None:
    values = np.linspace(0, 1, 5000)  # larger than one block at 2,000 repeats
    low, high = metrics.bootstrap_mean(values)
    assert 0.48 < low < 0.5 < high < 0.52


def test_the_interval_of_a_recovered_share_is_paired() -> None:
    rng = np.random.default_rng(0)
    full = rng.uniform(0.5, 1, 200)
    none = np.zeros(200)
    # the method always gives exactly half of what the full text gives: paired resampling leaves no spread
    assert metrics.pooled_recovered_share([(full / 2, none, full)]) == pytest.approx((0.5, 0.5, 0.5))
    assert metrics.pooled_recovered_share([(full, full, none)]) is None
    # one question in twelve gains from the text: some resamples have none of it
    full, none = np.eye(1, 12)[0], np.zeros(12)
    assert metrics.pooled_recovered_share([(full, none, full)]) is None


def test_no_answers_is_refused() -> None:
    for score in (metrics.f1, metrics.exact_match, metrics.containment, metrics.rouge_l_answer):
        with pytest.raises(ValueError, match="at least one reference"):
            score("x", [])
