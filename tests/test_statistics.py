"""Intervals against values known in closed form, and against how often they cover the truth."""

from statistics import NormalDist

import numpy as np
import pytest

from calora.errors import CaloraError
from calora.evaluation.statistics import (
    difference_over_seeds,
    mean_interval,
    mean_over_seeds,
    paired_difference,
    recovered_share,
)

ITEMS, DRAWS, EXPERIMENTS = 1500, 2000, 1000
ACCURACY, GAIN = 0.85, 0.02
NORMAL = NormalDist()


def correct(share, seed):
    """Items of which a share is right, each on its own."""
    return np.random.default_rng(seed).permutation(np.arange(ITEMS) < round(share * ITEMS)).astype(float).tolist()


def test_intervals_are_those_of_the_normal_approximation():
    ours, theirs = correct(0.86, 1), correct(0.80, 2)
    half = 1.96 * np.std(ours) / np.sqrt(ITEMS)
    assert mean_interval(ours, DRAWS, 0).ci == pytest.approx((0.86 - half, 0.86 + half), abs=2e-3)
    gain = paired_difference(ours, theirs, DRAWS, 0)
    half = 1.96 * np.std(np.subtract(ours, theirs)) / np.sqrt(ITEMS)
    assert gain.value == pytest.approx(0.06)
    assert gain.ci == pytest.approx((0.06 - half, 0.06 + half), abs=3e-3)


def test_recovered_share():
    share = recovered_share(correct(0.83, 1), correct(0.60, 2), correct(0.86, 3), DRAWS, 0)
    assert share.value == pytest.approx(0.23 / 0.26)
    low, high = share.ci
    assert low < share.value < high < low + 0.3
    assert not share.below_noise


def test_recovered_share_of_a_gap_that_some_resamples_lack():
    """The gap is significant, yet in some of the resamples it is 0 or negative: the interval stays finite and ordered."""
    share = recovered_share(correct(0.862, 1), correct(0.833, 2), correct(0.860, 3), DRAWS, 0)
    assert not share.below_noise
    assert share.gap.ci[0] < 0.005
    assert np.isfinite(share.ci).all()
    assert share.ci[0] < share.value < share.ci[1]


def test_recovered_share_without_a_gap_says_nothing():
    share = recovered_share(correct(0.87, 1), correct(0.86, 2), correct(0.86, 3), DRAWS, 0)
    assert share.to_json()["ci"] is None
    assert share.to_json()["value"] is None
    assert share.below_noise


def test_json_is_to_four_decimals():
    ours, theirs = correct(0.8606, 1), correct(0.80, 2)
    gain = paired_difference(ours, theirs, 50, 0).to_json()
    assert gain["value"] == 0.0607 and list(gain) == ["value", "ci"]
    assert gain["ci"] == [round(end, 4) for end in gain["ci"]]
    share = recovered_share(ours, theirs, correct(0.9, 3), 50, 0).to_json()
    assert list(share) == ["value", "ci", "below_noise", "gap"] and list(share["gap"]) == ["value", "ci"]
    assert mean_over_seeds([ours, theirs]).to_json()["value"] == 0.8303


def test_one_seed_has_the_interval_of_its_items_and_says_so():
    one, items = mean_over_seeds([correct(0.86, 1)]), mean_interval(correct(0.86, 1), DRAWS, 0)
    assert one.ci == pytest.approx(items.ci, abs=2e-3)
    assert (one.covers, one.means) == ("items", pytest.approx((0.86,)))
    assert mean_over_seeds([correct(0.86, 1)] * 2).covers == "seeds and items"


def test_seeds_that_agree_in_everything_add_nothing():
    one, three = (mean_over_seeds([correct(0.86, 1)] * count) for count in (1, 3))
    assert three.ci == pytest.approx(one.ci)


def test_seeds_that_differ_much_have_the_t_interval_of_their_means():
    over = mean_over_seeds([correct(share, seed) for seed, share in enumerate((0.5, 0.6, 0.7))])
    assert over.means == pytest.approx((0.5, 0.6, 0.7))
    assert over.ci == pytest.approx((0.6 - 4.3027 * 0.1 / 3**0.5, 0.6 + 4.3027 * 0.1 / 3**0.5), abs=2e-3)


def test_intervals_end_where_scores_do():
    assert mean_over_seeds([correct(0.7, 1), correct(0.99, 2)]).ci == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0], 10, 0), "scores: expected two test items or more, found 1"),
        (lambda: mean_over_seeds([]), "hits: expected the same items for every seed"),
        (lambda: mean_over_seeds([[1, 0], [1, 0, 1]]), "hits: expected the same items for every seed"),
        (lambda: mean_over_seeds([[1, 0], [2, 0]]), r"hits: expected scores in \[0, 1\]"),
        (lambda: paired_difference([1, 0], [1, 0, 1], 10, 0), r"theirs: expected the shape of ours, \(2,\)"),
        (lambda: difference_over_seeds([[1, 0]], [[1, 0]] * 2), r"theirs: expected the shape of ours, \(1, 2\)"),
        (lambda: recovered_share([1, 0], [1, 0], [1, 0, 1], 10, 0), "expected the shape of"),
    ],
)  # fmt: skip
def test_scores_that_do_not_fit_are_refused(call, message):
    with pytest.raises(CaloraError, match=message):
        call()


def runs(generator, accuracy, item, spread, seeds):
    """Hits [seeds, ITEMS] of runs about this right, and the mean over all seeds and items that could be drawn.

    A hit is item + noise + the seed's shift + quantile > 0. The means of seeds vary by `spread` (standard deviation).
    """
    level = NORMAL.inv_cdf(accuracy)
    shift = spread / NORMAL.pdf(level)
    noise = np.sqrt(1 - SHARED) * generator.standard_normal((seeds, ITEMS), dtype=np.float32)
    hits = noise + item > -level - shift * generator.standard_normal((seeds, 1))
    return hits, NORMAL.cdf(level / (1 + shift**2) ** 0.5)


SHARED = 0.88  # of the variance of the latent score belongs to the item: then two seeds agree on 90 % of the items


def coverage(spread, seeds=3, paired=False):
    """In how many experiments the interval holds the true mean; paired methods share 3/4 of the item's part."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(EXPERIMENTS):
        shared, *own = generator.standard_normal((3, ITEMS), dtype=np.float32) * np.sqrt(SHARED)
        if paired:
            (ours, best), (theirs, worst) = (
                runs(generator, accuracy, 0.75**0.5 * shared + 0.5 * mine, spread / 2**0.5, seeds)
                for accuracy, mine in zip((ACCURACY + GAIN, ACCURACY), own, strict=True)
            )
            over, truth = difference_over_seeds(ours, theirs), best - worst
        else:
            hits, truth = runs(generator, ACCURACY, shared, spread, seeds)
            over = mean_over_seeds(hits)
        held += over.ci[0] <= truth <= over.ci[1]
    return held / EXPERIMENTS


def test_the_simulated_seeds_agree_as_real_ones_do():
    generator = np.random.default_rng(0)
    item = generator.standard_normal(ITEMS) * np.sqrt(SHARED)
    first, second = runs(generator, ACCURACY, item, 0, 2)[0]
    assert (first == second).mean() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("spread", [0, 0.005, 0.01, 0.02])
def test_intervals_over_three_seeds_cover_95_percent(spread, paired):
    assert 0.92 <= coverage(spread, 3, paired) <= 0.98
