"""Metrics against scikit-learn's and SQuAD v1.1's evaluation script, and what a bootstrap makes of them."""

import random
import re
import string

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from calora.evaluation.metrics import LABELS as LABEL_PAIR
from calora.evaluation.metrics import counts_pairs, exact_match, items_of, linear, normalise, token_f1, value_of
from calora.evaluation.statistics import mean_interval, mean_over_seeds, paired_difference, recovered_share
from calora.models.tasks import Example, Task


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The cat, the hat", "cat hat"),
        ("A.M.", "am"),  # punctuation goes before articles: no article "a" is left
        ("the-end", "theend"),
        ("an   apple\n a day_off", "apple dayoff"),
        ("Theory of a band", "theory of band"),
        ("“Ångström”", "“ångström”"),  # only ASCII's punctuation
        ("the", ""),
    ],
)
def test_normalise_in_the_order_of_the_script(text, normal):
    assert normalise(text) == normal


def test_f1_counts_shared_words_once_each():
    assert token_f1("The cat, the hat", ["a cat hat"]) == 1.0
    assert token_f1("cat cat dog", ["cat bird"]) == pytest.approx(2 * 1 / 5)
    assert token_f1("x", ["y", "x z"]) == pytest.approx(2 / 3)


def test_no_shared_word_is_an_f1_of_0_even_of_two_empty_texts():
    """As the script of v1.1; that of v2.0 gives 1. An exact match compares texts, and is right in both."""
    assert token_f1("", [""]) == token_f1("the", ["The"]) == token_f1("", ["cat"]) == token_f1("cat", [""]) == 0
    assert exact_match("the", ["The"]) and exact_match("", ["cat", "a"])


def test_exact_match_of_any_reference():
    assert exact_match("The Hat!", ["cat", "hat"])
    assert not exact_match("hats", ["cat", "hat"])


def labelled(count, seed, size, wrong=0.3):
    """Right labels and chosen ones, of which a share is drawn anew."""
    generator = np.random.default_rng(seed)
    right = generator.integers(0, count, size)
    chosen = np.where(generator.random(size) < wrong, generator.integers(0, count, size), right)
    return right.tolist(), chosen.tolist()


def task_with(count, metric):
    return Task("t", "{text}", tuple(f"a{i}" for i in range(count)), 8, 4, metrics=(metric,))


def of_labels(metric, right, chosen, count):
    """The metric by calora: as stages compute it."""
    task = task_with(count, metric)
    items = items_of(metric, task, chosen, [""] * len(chosen), [Example([1], label=label) for label in right])
    return items, value_of(metric, counts_pairs(metric, task))


REFERENCES = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,
    "macro_f1": lambda right, chosen: sklearn.metrics.f1_score(right, chosen, average="macro"),
    "matthews": sklearn.metrics.matthews_corrcoef,
}
LABELS = [(2, 0, 7), (2, 1, 400), (3, 2, 56), (3, 3, 2000), (7, 4, 300)]


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns where a label is never chosen
@pytest.mark.parametrize("metric", REFERENCES)
@pytest.mark.parametrize(("count", "seed", "size"), LABELS)
def test_metrics_of_labels_are_those_of_scikit_learn(metric, count, seed, size):
    if metric == "f1" and count > 2:
        return
    right, chosen = labelled(count, seed, size)
    for a, b in (
        (right, chosen),
        (right, right),
        ([0] * size, chosen),  # one right label alone
        (right, [count - 1] * size),  # one chosen label alone
        ([0] * size, [0] * size),
        ([1] * size, [0] * size),
        ([label // 2 for label in right], [label // 2 for label in chosen]),  # the last labels never occur
    ):
        items, metric_of = of_labels(metric, a, b, count)
        assert float(metric_of(items)) == pytest.approx(REFERENCES[metric](a, b), abs=1e-12)


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "matthews"])
def test_a_bootstrap_computes_the_metric_of_each_resample_anew(metric):
    count = 2 if metric == "f1" else 3
    right, ours = labelled(count, 0, 120, 0.2)
    theirs = labelled(count, 0, 120, 0.6)[1]
    (a, metric_of), (b, _) = (of_labels(metric, right, chosen, count) for chosen in (ours, theirs))
    how, reference = {"n_resamples": 60, "confidence_level": 0.95, "method": "percentile", "paired": True, "vectorized": False}, REFERENCES[metric]  # fmt: skip

    def bounds(statistic, *samples):
        places = np.arange(len(right))
        found = scipy.stats.bootstrap((places, places), lambda i, _: statistic(*(np.take(s, i.astype(int)) for s in (right, *samples))), rng=np.random.default_rng(3), **how)  # fmt: skip
        return tuple(found.confidence_interval)

    one = mean_interval(a, 60, 3, metric_of)
    assert one.value == pytest.approx(reference(right, ours), abs=1e-12)
    gain = paired_difference(a, b, 60, 3, metric_of)
    assert gain.value == pytest.approx(reference(right, ours) - reference(right, theirs), abs=1e-12)
    assert gain.ci == pytest.approx(bounds(lambda r, x, y: reference(r, x) - reference(r, y), ours, theirs), abs=1e-12)
    share = recovered_share(a, b, [label * LABEL_PAIR + label for label in right], 60, 3, metric_of)
    assert share.value == pytest.approx(
        (reference(right, ours) - reference(right, theirs)) / (1 - reference(right, theirs)), abs=1e-12
    )


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1", "matthews"])
def test_the_scores_that_stand_for_a_metric_have_its_mean_and_its_spread(metric):
    count = 2 if metric == "f1" else 3
    right, chosen = labelled(count, 5, 1500)
    items, metric_of = of_labels(metric, right, chosen, count)
    scores = linear(metric, metric != "accuracy", items)
    assert np.mean(scores) == pytest.approx(float(metric_of(items)), abs=1e-6)
    low, high = mean_interval(items, 1000, 0, metric_of).ci
    assert 2 * 1.96 * np.std(scores) / len(scores) ** 0.5 == pytest.approx(high - low, rel=0.08)  # 1,000 resamples: 3 %
    over = mean_over_seeds([scores, scores], bounded=metric == "accuracy")
    assert over.ci == pytest.approx((low, high), abs=0.004)


def official(predictions, answers):
    """EM and F1 in percent, as the definition of SQuAD v1.1 says: written from it, not from ours."""

    def plain(text):
        kept = [letter for letter in text.lower() if letter not in set(string.punctuation)]
        return [word for word in re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()]

    def overlap(got, want):
        got, want = plain(got), plain(want)
        left, same = list(want), 0
        for word in got:
            if word in left:
                left.remove(word)
                same += 1
        if same == 0:
            return 0
        precision, recall = 1.0 * same / len(got), 1.0 * same / len(want)
        return 2 * precision * recall / (precision + recall)

    exact = f1 = total = 0
    for key, references in answers.items():
        total += 1
        if key in predictions:
            exact += max(" ".join(plain(predictions[key])) == " ".join(plain(one)) for one in references)
            f1 += max(overlap(predictions[key], one) for one in references)
    return {"em": 100.0 * exact / total, "f1": 100.0 * f1 / total}


def test_written_answers_have_the_scores_of_squads_script():
    generator = random.Random(0)
    words = ["The", "a", "an", "cat", "Cat.", "hat!", "of", "“Ångström”", "u.s.", "1,000", "—", "the-end", "don't", "", "\u00a0x"]  # fmt: skip

    def text():
        return " ".join(generator.choices(words, k=generator.randrange(5)))

    answers = {n: [text() for _ in range(generator.randrange(1, 4))] for n in range(500)}
    predictions = {n: generator.choice([*references, text()]) for n, references in answers.items()}
    task = Task("t", "{text}", (), 8, 4)
    examples = [Example([1], references=tuple(references)) for references in answers.values()]
    expected = official(predictions, answers)
    assert 20 < expected["f1"] < expected["em"] < 90  # two empty texts match, and share no word
    for metric in ("em", "f1"):
        items = items_of(metric, task, [-1] * 500, list(predictions.values()), examples)
        assert 100 * value_of(metric, counts_pairs(metric, task))(items) == pytest.approx(expected[metric], abs=1e-12)
