"""lm-eval as the reference scorer: a task as its configuration, and a run of it in memory.

lm-eval is EleutherAI's evaluation harness, whose numbers others can check. A faster scorer is
right when it agrees with this one row by row. Two of lm-eval's habits matter for that:

- White space at the end of a prompt is scored with the choice, not given as context. It adds the
  same amount to every choice, which moves the log-likelihood *per character*.
- The text of prompt and choice is tokenised as a whole, and the choice's tokens are those beyond
  the number that the prompt has alone.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError
from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH, find_metric
from recycle_cli.evaluation.tasks import Row

SPLIT = "test"

# `metrics.normalise` in lm-eval's own terms: its exact_match deletes these patterns one after the
# other from both texts, then ignores case.
NORMALISE_PATTERNS = [r"(?s)^.*####", r" ", r"^\s+|\s+$", r"^\.+|\.+$"]


@dataclass(frozen=True)
class Sample:
    """What lm-eval found for one row.

    Args:
        row: the row's place in the task, from 0.
        scores: 0 or 1 for each metric of the configuration.
        log_likelihoods: in nats, one for each choice; empty where text was generated.
        text: the generated text up to the end-of-sequence token; None where choices were scored.
    """

    row: int
    scores: dict[str, float]
    log_likelihoods: tuple[float, ...]
    text: str | None


@dataclass(frozen=True)
class LmEvalResult:
    """The mean of each metric, and the samples in the order of the rows."""

    metrics: dict[str, float]
    samples: tuple[Sample, ...]


def lm_eval_config(
    name: str,
    prompts: Sequence[str],
    rows: Sequence[Row],
    metric: str,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """The lm-eval task that scores these prompts, with its data in memory.

    `acc` becomes a `multiple_choice` task with lm-eval's `acc` and `acc_norm`, of which the second
    is ours; `exact_match` becomes a greedy `generate_until` task that ends at the end-of-sequence
    token alone.

    Args:
        name: the name of the task.
        prompts: the whole text before each answer, chat template included, none empty.
        rows: the rows that the prompts were made from.
        metric: a key of `metrics.METRICS`.
        max_new_tokens: the longest answer to generate, in tokens.

    Raises:
        InputError: there is no such metric.
        ValueError: there are no rows, not one prompt for each, an empty prompt, or a row without
            the choices that the metric needs.
    """
    if not rows or len(prompts) != len(rows) or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(rows)} rows, or an empty prompt")
    if find_metric(metric).needs_choices and not all(row.choices for row in rows):
        raise ValueError(f"the metric {metric!r} needs choices in every row")
    return {
        "task": name,
        "test_split": SPLIT,
        # The names of columns, not templates: lm-eval then takes their values as they are, and
        # neither Jinja nor a guess at literals touches the text.
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **(_choice_fields(prompts, rows) if metric == ACC else {}),
        **(_generation_fields(prompts, rows, max_new_tokens) if metric == EXACT_MATCH else {}),
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
    prompts: Sequence[str], rows: Sequence[Row], max_new_tokens: int
) -> dict[str, Any]:
    records = [
        {"prompt": prompt, "answer": row.output} for prompt, row in zip(prompts, rows, strict=True)
    ]
    normalising = {"regexes_to_ignore": NORMALISE_PATTERNS, "ignore_case": True}
    return {
        "custom_dataset": _in_memory(records),
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [{**_mean_of(EXACT_MATCH), **normalising}],
    }


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _in_memory(records: list[dict[str, Any]]) -> Any:
    """What lm-eval calls for its data: no file, so nothing is left in the cache of `datasets`."""

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_list(records)}

    return load


def run_lm_eval(
    model: Any, tokenizer: Any, config: dict[str, Any], batch_size: int = 8
) -> LmEvalResult:
    """Scores a loaded model on a task with lm-eval, offline and without its task index.

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
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _without_chatter():
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            softmax_dtype="float32",
        )
        loaded = TaskManager(include_defaults=False).load([config])
        _check_lengths(lm, loaded["tasks"][config["task"]])
        output = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    return _read_output(output, config)


def _check_lengths(lm: Any, task: Any) -> None:
    for number, doc in enumerate(task.test_docs(), start=1):
        if "choices" in doc:
            longest = max(len(lm.tok_encode(doc["prompt"] + choice)) for choice in doc["choices"])
        else:
            room = task.config.generation_kwargs["max_gen_toks"]
            longest = len(lm.tok_encode(doc["prompt"])) + room
        if longest > lm.max_length:
            raise InputError(
                f"row {number} of the task takes {longest} tokens with its answer; the model's "
                f"context holds {lm.max_length}",
                "shorten or leave out the row: scoring a cut prompt would answer another question",
            )


def _read_output(output: dict[str, Any], config: dict[str, Any]) -> LmEvalResult:
    name = config["task"]
    metrics = [entry["metric"] for entry in config["metric_list"]]
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    return LmEvalResult(
        metrics={metric: float(output["results"][name][f"{metric},none"]) for metric in metrics},
        samples=tuple(_read_sample(sample, metrics) for sample in samples),
    )


def _read_sample(sample: dict[str, Any], metrics: list[str]) -> Sample:
    responses = sample["filtered_resps"]
    generated = isinstance(responses[0], str)
    return Sample(
        row=sample["doc_id"],
        scores={metric: float(sample[metric]) for metric in metrics},
        log_likelihoods=() if generated else tuple(float(value) for value, _ in responses),
        text=responses[0] if generated else None,
    )


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps stdout for results: prints go to stderr, progress bars only to a terminal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():
            sink = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(sink))
        yield
