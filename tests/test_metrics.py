"""Scores of answers against those of SQuAD v1.1's evaluation script."""

import pytest

from calora.evaluation.metrics import exact_match, normalise, token_f1


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
