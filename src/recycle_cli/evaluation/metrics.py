"""What counts as a right answer. Pure functions over text and log-likelihoods."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recycle_cli.errors import RecycleError, unknown_name


@dataclass(frozen=True)
class Metric:
    """A metric that a task can be scored with.

    Args:
        name: what `metric` in a task.yaml says.
        sentence: what it measures, in one sentence.
        needs_choices: whether every row must list its possible answers.
    """

    name: str
    sentence: str
    needs_choices: bool


ACC = "acc"
EXACT_MATCH = "exact_match"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            ACC,
            "share of rows whose right choice has the highest log-likelihood per character",
            needs_choices=True,
        ),
        Metric(
            EXACT_MATCH,
            "share of rows whose greedily generated answer equals the right one after normalising",
            needs_choices=False,
        ),
    )
}


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]


def normalise(text: str) -> str:
    """The form in which two answers are compared.

    Keeps what follows the last `####` (the answer mark of GSM8K), then removes all spaces, strips
    other white space and after it full stops, and lowers the case: the rule of arXiv 2602.12323,
    in its order.
    """
    answer = text.rsplit("####", 1)[-1]
    return answer.replace(" ", "").strip().strip(".").lower()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two texts are equal once both are normalised."""
    return normalise(prediction) == normalise(answer)


def choose(log_likelihoods: Sequence[float], choices: Sequence[str]) -> int:
    """The index of the choice with the highest log-likelihood per character.

    This is the rule of lm-eval's `acc_norm`: characters are Unicode code points, the division is
    in double precision, and the first of exact ties wins.

    Args:
        log_likelihoods: the log-likelihood of each choice in nats, (choices,).
        choices: the texts, none of them empty.

    Raises:
        ValueError: there is no choice, or not one log-likelihood for each.
        RecycleError: a log-likelihood is NaN, so that nothing can be chosen.
    """
    if not choices or len(log_likelihoods) != len(choices):
        raise ValueError(f"{len(log_likelihoods)} log-likelihoods for {len(choices)} choices")
    if any(math.isnan(value) for value in log_likelihoods):
        raise RecycleError(
            "the model gave NaN as the log-likelihood of a choice",
            "its numbers overflow in this dtype: set RECYCLE_DTYPE=float32",
        )
    per_character = [
        value / len(choice) for value, choice in zip(log_likelihoods, choices, strict=True)
    ]
    return max(range(len(choices)), key=per_character.__getitem__)
