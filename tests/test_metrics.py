"""Scores and intervals against values known in closed form."""

import numpy as np
import pytest

from calora.evaluation.metrics import mean_interval, paired_difference, recovered_share, token_f1

ITEMS, DRAWS = 1500, 2000


def correct(share, seed):
    """Items of which a share is right, each on its own."""
    return np.random.default_rng(seed).permutation(np.arange(ITEMS) < round(share * ITEMS)).astype(float).tolist()


def test_f1_counts_shared_words_once_each():
    assert token_f1("The cat, the hat", ["a cat hat"]) == 1.0
    assert token_f1("cat cat dog", ["cat bird"]) == pytest.approx(2 * 1 / 5)
    assert token_f1("", [""]) == 1.0
    assert token_f1("x", ["y", "x z"]) == pytest.approx(2 / 3)


def test_intervals_are_those_of_the_normal_approximation():
    ours, theirs = correct(0.86, 1), correct(0.80, 2)
    half = 1.96 * np.std(ours) / np.sqrt(ITEMS)
    assert mean_interval(ours, DRAWS, 0) == pytest.approx([0.86 - half, 0.86 + half], abs=2e-3)
    gain = paired_difference(ours, theirs, DRAWS, 0)
    half = 1.96 * np.std(np.subtract(ours, theirs)) / np.sqrt(ITEMS)
    assert gain["value"] == 0.06
    assert gain["ci"] == pytest.approx([0.06 - half, 0.06 + half], abs=3e-3)


def test_recovered_share():
    share = recovered_share(correct(0.83, 1), correct(0.60, 2), correct(0.86, 3), DRAWS, 0)
    assert share["value"] == pytest.approx(0.23 / 0.26, abs=1e-4)
    low, high = share["ci"]
    assert low < share["value"] < high < low + 0.3
    assert not share["below_noise"]


def test_recovered_share_of_a_gap_that_some_resamples_lack():
    """The gap is significant, yet in some of the resamples it is 0 or negative: the interval stays finite and ordered."""
    share = recovered_share(correct(0.862, 1), correct(0.833, 2), correct(0.860, 3), DRAWS, 0)
    assert not share["below_noise"]
    assert share["gap"]["ci"][0] < 0.005
    low, high = share["ci"]
    assert np.isfinite([low, high]).all()
    assert low < share["value"] < high


def test_recovered_share_without_a_gap_says_nothing():
    share = recovered_share(correct(0.87, 1), correct(0.86, 2), correct(0.86, 3), DRAWS, 0)
    assert share["below_noise"]
    assert share["ci"] is None
    assert share["value"] is None
