"""What counts as a right answer. Pure functions over text and log-likelihoods."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from recycle_cli.errors import InputError, RecycleError, unknown_name


@dataclass(frozen=True)
class Metric:
    """A metric that a task can be scored with.

    Args:
        name: what `--metric` and `metric` in a task.yaml say.
        sentence: what it measures, in one sentence.
        needs_choices: whether every row must list its possible answers.
        eval_only: whether only `recycle eval` computes it, so that no task.yaml may name it:
            selecting and tuning ask whether answers are right, not how nearly.
        higher_is_better: false where less is better.
    """

    name: str
    sentence: str
    needs_choices: bool = False
    eval_only: bool = False
    higher_is_better: bool = True


ACC = "acc"
EXACT_MATCH = "exact_match"
F1 = "f1"
ROUGE_L = "rouge_l"
PERPLEXITY = "perplexity"
GENERATED = (EXACT_MATCH, F1, ROUGE_L)
"""Metrics of text that the model writes."""

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
        ),
        Metric(
            F1,
            "how far the words of the generated answer are those of the right one: mean F1",
            eval_only=True,
        ),
        Metric(
            ROUGE_L,
            "how far they are the same words in the same order: mean ROUGE-L F-measure",
            eval_only=True,
        ),
        Metric(
            PERPLEXITY,
            "how surprised the model is by the right answers, a token: 1 is not at all",
            eval_only=True,
            higher_is_better=False,
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


def find_task_metric(name: str) -> Metric:
    """The metric of that name, for a task to name as its own.

    Raises:
        InputError: there is none, or it is computed by `recycle eval` alone.
    """
    metric = find_metric(name)
    if metric.eval_only:
        raise InputError(
            f"a task cannot have {name!r} as its metric: select and tune ask whether answers are "
            "right",
            f"write metric: {EXACT_MATCH}, and ask for it with recycle eval --metric {name}",
        )
    return metric


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


def token_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of the share of predicted words that are in the answer, and of words of the
    answer that were predicted; words are counted as often as they occur.

    The rule of SQuAD: case, punctuation and English articles do not count. Where one of the two has
    no words it is 1 if the other has none either, else 0.
    """
    ours, theirs = _squad_words(prediction), _squad_words(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _squad_words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def rouge_l(prediction: str, answer: str) -> float:
    """The F-measure of ROUGE-L (Lin 2004): of the longest sequence of words that both have in the
    same order, not necessarily side by side.

    It is computed by the package rouge-score, without stemming. Its own way to find words knows
    the letters a to z alone and would give 0 to all other scripts, so words here are runs of
    letters and digits of any.
    """
    score = _rouge_scorer().score(answer, prediction)
    return float(score["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(["rougeL"], tokenizer=_Words())
