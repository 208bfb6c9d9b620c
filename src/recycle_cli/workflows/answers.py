"""How a model, with or without an adapter on it, does on rows of a task, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.evaluation.metrics import ACC, choose, exact_match
from recycle_cli.progress import Progress

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.evaluation.tasks import Row
    from recycle_cli.lora.routed import RoutedAdapter
    from recycle_cli.lora.update import ModelUpdate


@dataclass(frozen=True)
class Answers:
    """The outcome for each row, in the order of the rows.

    Args:
        correct: whether the row counts as right under the metric.
        predictions: what was answered.
        log_likelihoods: of the right answer, in nats; None where it was not asked for.
    """

    correct: list[bool]
    predictions: list[str]
    log_likelihoods: list[float] | None


def answer_rows(
    base: "BaseModel",
    update: "ModelUpdate | RoutedAdapter | None",
    rows: "Sequence[Row]",
    metric: str,
    progress: Progress,
    max_new_tokens: int = 30,
    likelihoods: bool = False,
) -> Answers:
    """Runs rows through the base model with an adapter on it (or, with None, without).

    Args:
        base: the model.
        update: the adapter.
        rows: at least one.
        metric: `acc` (the likeliest choice per character) or `exact_match` (greedy text).
        progress: told of every batch.
        max_new_tokens: the longest answer, for `exact_match`.
        likelihoods: also score the right answers of `exact_match` rows, which costs a pass more.
    """
    from recycle_cli.engine.encoding import encode_prompts, encode_questions
    from recycle_cli.engine.routing import put_on
    from recycle_cli.engine.scoring import candidate_log_likelihoods, greedy_answers

    with put_on(base, update):
        if metric == ACC:
            scores = candidate_log_likelihoods(base, encode_questions(base, rows), progress)
            return _chosen(rows, scores)
        texts = greedy_answers(base, encode_prompts(base, rows), max_new_tokens, progress)
        correct = [exact_match(text, row.output) for text, row in zip(texts, rows, strict=True)]
        if not likelihoods:
            return Answers(correct, texts, None)
        scores = candidate_log_likelihoods(base, encode_questions(base, rows), progress)
        likely = [_of_answer(row, s) for row, s in zip(rows, scores, strict=True)]
        return Answers(correct, texts, likely)


def _chosen(rows: "Sequence[Row]", scores: list[list[float]]) -> Answers:
    predictions = [
        row.choices[choose(of_row, row.choices)] for row, of_row in zip(rows, scores, strict=True)
    ]
    return Answers(
        correct=[answer == row.output for answer, row in zip(predictions, rows, strict=True)],
        predictions=predictions,
        log_likelihoods=[_of_answer(row, s) for row, s in zip(rows, scores, strict=True)],
    )


def _of_answer(row: "Row", scores: list[float]) -> float:
    return scores[row.choices.index(row.output)] if row.choices else scores[0]
