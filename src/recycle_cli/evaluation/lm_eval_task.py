"""A task of one's own as an lm-eval task in memory.

lm-eval is EleutherAI's evaluation harness, whose numbers others can check. A faster scorer is
right when it agrees with this one row by row. Two of lm-eval's habits matter for that:

- White space at the end of a prompt is scored with the choice, not given as context. It adds the
  same amount to every choice, which moves the log-likelihood *per character*.
- The text of prompt and choice is tokenised as a whole, and the choice's tokens are those beyond
  the number that the prompt has alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from recycle_cli.errors import InputError
from recycle_cli.evaluation.lm_eval_run import TaskOutcome, run, without_chatter
from recycle_cli.evaluation.metrics import (
    ACC,
    EXACT_MATCH,
    F1,
    PERPLEXITY,
    ROUGE_L,
    find_metric,
    rouge_l,
    token_f1,
)
from recycle_cli.evaluation.tasks import Row

SPLIT = "test"

# `metrics.normalise` in lm-eval's own terms: its exact_match deletes these patterns one after the
# other from both texts, then ignores case.
NORMALISE_PATTERNS = [r"(?s)^.*####", r" ", r"^\s+|\s+$", r"^\.+|\.+$"]


def lm_eval_config(
    name: str,
    prompts: Sequence[str],
    rows: Sequence[Row],
    metric: str,
    max_new_tokens: int = 32,
    delimiter: str = "",
    answer_tokens: Sequence[int] = (),
) -> dict[str, Any]:
    """The lm-eval task that scores these prompts, with its data in memory.

    `acc` becomes a `multiple_choice` task with lm-eval's `acc` and `acc_norm`, of which the second
    is ours; `exact_match`, `f1` and `rouge_l` a greedy `generate_until` task that ends at the
    end-of-sequence token alone; `perplexity` a `loglikelihood` task.

    Args:
        name: the name of the task.
        prompts: the whole text before each answer, chat template included, none empty.
        rows: the rows that the prompts were made from.
        metric: a key of `metrics.METRICS`.
        max_new_tokens: the longest answer to generate, in tokens.
        delimiter: what stands between prompt and answer; it is no part of a choice's length.
        answer_tokens: for `perplexity`, how many tokens each answer is.

    Raises:
        InputError: there is no such metric.
        ValueError: there are no rows, not one prompt for each, an empty prompt, or a row without
            the choices that the metric needs.
    """
    if not rows or len(prompts) != len(rows) or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(rows)} rows, or an empty prompt")
    if find_metric(metric).needs_choices and not all(row.choices for row in rows):
        raise ValueError(f"the metric {metric!r} needs choices in every row")
    if metric == ACC:
        fields = _choice_fields(prompts, rows)
    elif metric == PERPLEXITY:
        fields = _perplexity_fields(prompts, rows, delimiter, answer_tokens)
    else:
        fields = _generation_fields(prompts, rows, metric, max_new_tokens)
    return {
        "task": name,
        "test_split": SPLIT,
        # The names of columns, not templates: lm-eval then takes their values as they are, and
        # neither Jinja nor a guess at literals touches the text.
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **fields,
    }


def _choice_fields(prompts: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    records = [
        {"prompt": prompt, "choices": list(row.choices), "answer": row.choices.index(row.output)}
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    return {
        "custom_dataset": _in_memory(records),
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
    }


def _generation_fields(
    prompts: Sequence[str], rows: Sequence[Row], metric: str, max_new_tokens: int
) -> dict[str, Any]:
    records = [
        {"prompt": prompt, "answer": row.output} for prompt, row in zip(prompts, rows, strict=True)
    ]
    scorers = {
        EXACT_MATCH: {
            **_mean_of(EXACT_MATCH),
            "regexes_to_ignore": NORMALISE_PATTERNS,
            "ignore_case": True,
        },
        F1: _mean_of(_as_lm_eval_calls_it(F1, token_f1)),
        ROUGE_L: _mean_of(_as_lm_eval_calls_it(ROUGE_L, rouge_l)),
    }
    return {
        "custom_dataset": _in_memory(records),
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [scorers[metric]],
    }


def _perplexity_fields(
    prompts: Sequence[str], rows: Sequence[Row], delimiter: str, answer_tokens: Sequence[int]
) -> dict[str, Any]:
    records = [
        {"prompt": prompt, "answer": f"{delimiter}{row.output}", "tokens": tokens}
        for prompt, row, tokens in zip(prompts, rows, answer_tokens, strict=True)
    ]
    # lm-eval's own `perplexity` is a mean over rows; this one is over tokens, so that a long answer
    # counts for as much as several short ones of the same length together.
    return {
        "custom_dataset": _in_memory(records),
        "output_type": "loglikelihood",
        # lm-eval puts a delimiter before choices alone.
        "target_delimiter": "",
        "process_results": _with_tokens,
        "metric_list": [
            {
                "metric": PERPLEXITY,
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    }


def _with_tokens(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    log_likelihood, _ = results[0]
    return {PERPLEXITY: (log_likelihood, doc["tokens"])}


def _mean_of(metric: Any) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _as_lm_eval_calls_it(
    name: str, score: Callable[[str, str], float]
) -> Callable[[list[str], list[str]], float]:
    def scored(references: list[str], predictions: list[str]) -> float:
        return score(predictions[0], references[0])

    scored.__name__ = name
    return scored


def _in_memory(records: list[dict[str, Any]]) -> Any:
    """What lm-eval calls for its data: no file, so nothing is left in the cache of `datasets`."""

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_list(records)}

    return load


def load_config(config: dict[str, Any]) -> Any:
    """The task of a configuration, as lm-eval loads it, without lm-eval's index of tasks."""
    from lm_eval.tasks import TaskManager

    with without_chatter():
        return TaskManager(include_defaults=False).load([config])


def run_lm_eval(
    model: Any, tokenizer: Any, config: dict[str, Any], batch_size: int = 8
) -> TaskOutcome:
    """Scores a loaded model on a task with lm-eval's stock model class: the reference that faster
    ways are compared with.

    Args:
        model: a transformers or PEFT causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        config: from `lm_eval_config`.
        batch_size: rows a forward pass.

    Raises:
        InputError: a row does not fit into the model's context; lm-eval would cut it and score
            what is left.
    """
    # Imported before the streams are redirected: logging handlers keep the stream they find.
    import datasets  # noqa: F401
    from lm_eval.models.huggingface import HFLM

    with without_chatter():
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            softmax_dtype="float32",
        )
    loaded = load_config(config)
    check_lengths(lm, loaded["tasks"][config["task"]])
    (task,) = run(lm, loaded).tasks
    return task


def check_lengths(lm: Any, task: Any) -> None:
    """Checks that the rows of a task made here fit into the model's context.

    Raises:
        InputError: one does not; lm-eval would cut it and score what is left.
    """
    delimiter = task.config.target_delimiter
    for number, doc in enumerate(task.test_docs(), start=1):
        if task.OUTPUT_TYPE == "generate_until":
            room = task.config.generation_kwargs["max_gen_toks"]
            longest = len(lm.tok_encode(doc["prompt"])) + room
        else:
            answers = doc.get("choices") or [doc["answer"]]
            longest = max(
                len(lm.tok_encode(f"{doc['prompt']}{delimiter}{answer}")) for answer in answers
            )
        if longest > lm.max_length:
            raise InputError(
                f"row {number} of the task takes {longest} tokens with its answer; the model's "
                f"context holds {lm.max_length}",
                "shorten or leave out the row: scoring a cut prompt would answer another question",
            )
