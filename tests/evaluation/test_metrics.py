"""Normalising, exact match and the choice by log-likelihood per character."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.evaluation.metrics import (
    METRICS,
    choose,
    exact_match,
    find_metric,
    find_task_metric,
    normalise,
    rouge_l,
    token_f1,
)

# The white space that is not removed but stripped, before full stops are, is left out.
ONE_LINE = st.text(
    st.characters(
        exclude_categories=("Cs", "Cc", "Z"), exclude_characters="#", include_characters=" "
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Positive", "positive"),
        (" 1 234. ", "1234"),
        ("two and two make #### 4", "4"),
        ("#### 4 #### 5.", "5"),
        ("### 4", "###4"),
        ("\n\tyes\n", "yes"),
        ("a b\tc", "ab\tc"),
        ("...", ""),
        ("3.14", "3.14"),
        (" .\n", ""),
        # The order is the paper's: what stripping full stops uncovers is not stripped again.
        ("yes\n.", "yes\n"),
        ("# ###", "####"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(ONE_LINE)
def test_normalise_ignores_spaces_case_and_final_full_stop(text: str) -> None:
    assert normalise(f"  {text} . ") == normalise(text.replace(" ", ""))
    assert " " not in normalise(text)
    assert normalise(text) == normalise(text).lower()


@given(ONE_LINE)
def test_normalise_is_idempotent_on_one_line(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="#")))
def test_only_what_follows_the_last_mark_counts(before: str, answer: str) -> None:
    assert normalise(f"{before}####{answer}") == normalise(answer)


def test_exact_match() -> None:
    assert exact_match("The answer is #### 1 200.", "1200")
    assert exact_match("so #### 12", "because #### 12")
    assert not exact_match("12", "120")
    assert not exact_match("", "12")


def test_choose_divides_by_characters() -> None:
    # Unnormalised, the first would win.
    assert choose([-2.0, -3.0], ["no", "certainly"]) == 1
    assert choose([-1.0, -3.0], ["no", "yes"]) == 0


def test_choose_counts_code_points_and_not_bytes() -> None:
    assert len("ééé".encode()) == 6
    # A character: -1 against -0.9; a byte: -0.5 against -0.9.
    assert choose([-3.0, -2.7], ["ééé", "eee"]) == 1


def test_first_of_exact_ties_wins() -> None:
    assert choose([-2.0, -1.0, -1.0], ["ab", "c", "d"]) == 0
    assert choose([-math.inf, -math.inf], ["a", "b"]) == 0


@given(st.lists(st.tuples(st.floats(-1e3, 0), st.text(min_size=1)), min_size=1, max_size=8))
def test_choose_is_numpys_argmax(pairs: list[tuple[float, str]]) -> None:
    values, choices = [value for value, _ in pairs], [choice for _, choice in pairs]
    reference = np.argmax(np.array(values) / np.array([float(len(choice)) for choice in choices]))
    assert choose(values, choices) == reference


def test_choose_refuses_nan_and_wrong_lengths() -> None:
    with pytest.raises(RecycleError, match="gave NaN") as caught:
        choose([-1.0, math.nan], ["a", "b"])
    assert "float32" in caught.value.hint
    with pytest.raises(ValueError, match="1 log-likelihoods for 2 choices"):
        choose([-1.0], ["a", "b"])
    with pytest.raises(ValueError, match="0 log-likelihoods for 0 choices"):
        choose([], [])


def test_find_metric() -> None:
    assert {name: metric.needs_choices for name, metric in METRICS.items()} == {
        "acc": True,
        "exact_match": False,
        "f1": False,
        "rouge_l": False,
        "perplexity": False,
    }
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == [
        "perplexity"
    ]
    assert find_metric("acc").name == "acc"
    with pytest.raises(InputError, match="unknown metric 'exactmatch'") as caught:
        find_metric("exactmatch")
    assert "did you mean exact_match?" in caught.value.hint


def test_a_task_may_not_name_what_eval_alone_computes() -> None:
    assert find_task_metric("exact_match").name == "exact_match"
    with pytest.raises(InputError, match="a task cannot have 'f1' as its metric") as caught:
        find_task_metric("f1")
    assert "recycle eval --metric f1" in caught.value.hint


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("the red house", "a red house", 1.0),
        ("Red, red house!", "red house", 4 / 5),  # precision 2/3, recall 1
        ("red", "red house on a hill", 2 / 5),  # words: red house on hill
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("the", "", 1.0),
        ("красный дом",
         "красный", 2 / 3),
    ],
)  # fmt: skip
def test_token_f1_by_hand(prediction: str, answer: str, f1: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        # The longest common sequence is "a c d": precision 3/5, recall 3/4.
        ("a x c y d", "a b c d", 2 / 3),
        ("A, c; D.", "a b c d", 6 / 7),
        ("", "a", 0.0),
        ("été rouge", "été bleu", 1 / 2),
    ],
)
def test_rouge_l_by_hand(prediction: str, answer: str, score: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(score)


@given(st.lists(st.sampled_from("abcd"), max_size=9), st.lists(st.sampled_from("abcd"), max_size=9))
def test_rouge_l_is_that_of_the_package_where_words_are_english(
    ours: list[str], theirs: list[str]
) -> None:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    stock = RougeScorer(["rougeL"]).score(" ".join(theirs), " ".join(ours))
    assert rouge_l(" ".join(ours), " ".join(theirs)) == stock["rougeL"].fmeasure
