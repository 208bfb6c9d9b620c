"""A run of lm-eval over loaded tasks, and what came of it: metrics, and every row's outcome."""

import contextlib
import hashlib
import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Standard errors of metrics that are no means are bootstrapped by lm-eval, with 100,000 resamples
# and one process a core unless told otherwise: minutes an adapter, for the third digit of an error.
BOOTSTRAPS = 200
FEWSHOT_SEED = 1234
"""lm-eval's own."""


@dataclass(frozen=True)
class Sample:
    """What lm-eval found for one row.

    Args:
        row: the row's place in the task, from 0.
        prompt: the text that the model was given.
        target: the right answer, as text.
        scores: a number for each metric that has one for a single row.
        sums: for metrics over all rows, this row's sum and weight.
        log_likelihoods: in nats, one for each choice; empty where text was generated.
        choices: their texts.
        answer: the index of the right choice; None where there is none, or more than one.
        texts: the generated text as each filter left it; empty where choices were scored.
    """

    row: int
    prompt: str
    target: str
    scores: dict[str, float]
    sums: dict[str, tuple[float, float]]
    log_likelihoods: tuple[float, ...]
    choices: tuple[str, ...]
    answer: int | None
    texts: dict[str, str]

    @property
    def text(self) -> str | None:
        """The generated text, as the first filter left it."""
        return next(iter(self.texts.values()), None)


@dataclass(frozen=True)
class Figures:
    """What lm-eval reports of a task or a group.

    Args:
        name: its name.
        metrics: name -> value. A metric's name is lm-eval's; where a task filters answers in
            several ways, the filter stands behind a comma.
        stderr: the standard errors that lm-eval gives.
        higher_is_better: by metric, where lm-eval knows it.
        num_fewshot: examples in front of each prompt; None for a group whose tasks differ.
    """

    name: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    higher_is_better: dict[str, bool]
    num_fewshot: int | None


@dataclass(frozen=True)
class TaskOutcome(Figures):
    """A task's figures, its samples in the order of the rows, and a digest of what was asked."""

    samples: tuple[Sample, ...]
    sha256: str


@dataclass(frozen=True)
class GroupOutcome(Figures):
    """A group's figures and the names of its tasks, those of the groups in it included."""

    members: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """All tasks of a run, and the groups above them that have figures of their own."""

    tasks: tuple[TaskOutcome, ...]
    groups: tuple[GroupOutcome, ...]


def run(
    lm: Any,
    loaded: Any,
    limit: int | None = None,
    apply_chat_template: bool = False,
    hear: Callable[[str], object] = lambda _warning: None,
) -> Outcome:
    """Evaluates a model on tasks. Nothing is kept for a later run: lm-eval's own cache of answers
    is keyed by the text of requests alone, and would give one adapter's to the next.

    Args:
        lm: an `lm_eval.api.model.LM`.
        loaded: what lm-eval's `TaskManager.load` gave; it may be run again.
        limit: the first rows of each task only; None for all.
        apply_chat_template: put prompts into the model's chat template.
        hear: is given what lm-eval warns of.
    """
    # Imported before the streams are redirected: logging handlers keep the stream they find.
    import datasets  # noqa: F401
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        # Examples are drawn as prompts are built, so that a second run would go on drawing.
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with without_chatter(), _hearing(hear):
        output = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=apply_chat_template,
        )
    tasks = [_read_task(output, name, task) for name, task in loaded["tasks"].items()]
    groups = [_read_group(output, name) for name in output.get("groups", {})]
    return Outcome(tuple(tasks), tuple(groups))


def _read_task(output: dict[str, Any], name: str, task: Any) -> TaskOutcome:
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    by_row: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_row.setdefault(sample["doc_id"], []).append(sample)
    return TaskOutcome(
        **vars(_read_figures(output, name, output["results"][name])),
        samples=tuple(_read_sample(row, found, task) for row, found in by_row.items()),
        sha256=_digest(output, name, [found[0] for found in by_row.values()]),
    )


def _read_group(output: dict[str, Any], name: str) -> GroupOutcome:
    return GroupOutcome(
        **vars(_read_figures(output, name, output["groups"][name])),
        members=tuple(dict.fromkeys(_members(output, name))),
    )


def _members(output: dict[str, Any], name: str) -> Iterator[str]:
    """The tasks of a group and of the groups in it."""
    if name not in output["group_subtasks"]:
        yield name
    for child in output["group_subtasks"].get(name, ()):
        yield from _members(output, child)


def _read_figures(output: dict[str, Any], name: str, results: dict[str, Any]) -> Figures:
    metrics, stderr = {}, {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or not _is_number(value):
            continue
        if metric.endswith("_stderr"):
            stderr[metric_name(metric.removesuffix("_stderr"), chosen)] = float(value)
        else:
            metrics[metric_name(metric, chosen)] = float(value)
    known = output["higher_is_better"].get(name, {})
    directions = {
        metric: bool(known[plain])
        for metric in metrics
        if known.get(plain := metric.partition(",")[0]) is not None
    }
    return Figures(name, metrics, stderr, directions, output["n-shot"].get(name))


def metric_name(metric: str, chosen: str) -> str:
    """What a metric is called: its name, with the filter behind a comma where there is one."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _read_sample(row: int, found: Sequence[dict[str, Any]], task: Any) -> Sample:
    """One row's sample, from one record for each filter."""
    values = {
        metric_name(metric, record["filter"]): record[metric]
        for record in found
        for metric in record["metrics"]
    }
    responses = found[0]["filtered_resps"]
    generated = task.OUTPUT_TYPE == "generate_until"
    choices = _choices(task, found[0])
    target = found[0]["target"]
    answer = target if isinstance(target, int) and 0 <= target < len(choices) else None
    return Sample(
        row=row,
        prompt=str(found[0]["arguments"][0][0]),
        target=choices[answer] if answer is not None else _as_text(target),
        scores={name: float(value) for name, value in values.items() if _is_number(value)},
        sums={name: (float(v[0]), float(v[1])) for name, v in values.items() if _is_pair(v)},
        log_likelihoods=() if generated else tuple(_log_likelihood(one) for one in responses),
        choices=choices,
        answer=answer,
        texts={one["filter"]: _as_text(one["filtered_resps"][0]) for one in found * generated},
    )


def _choices(task: Any, record: dict[str, Any]) -> tuple[str, ...]:
    if task.OUTPUT_TYPE != "multiple_choice":
        return ()
    return tuple(str(choice) for choice in task.doc_to_choice(record["doc"]))


def _log_likelihood(response: Any) -> float:
    return float(response[0] if isinstance(response, tuple | list) else response)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, one of numpy's included."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))


def _digest(output: dict[str, Any], name: str, records: Sequence[dict[str, Any]]) -> str:
    """Over the version of the task and its rows; prompts, which depend on the model, apart."""
    asked = [[record["doc_hash"], record["target_hash"]] for record in records]
    whole = json.dumps([name, str(output["versions"].get(name)), asked])
    return hashlib.sha256(whole.encode()).hexdigest()


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keeps stdout for results and stderr for us: lm-eval prints, and draws bars of its own."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(_in_this_process())
        yield


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Makes lm-eval's bootstrap stay in this process, which holds a model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _hearing(hear: Callable[[str], object]) -> Iterator[None]:
    """Hands on what lm-eval warns of, each warning once."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.setdefault(record.getMessage().split("\n")[0])

    said: dict[str, None] = {}
    handler = Handler(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for warning in said:
            hear(warning)
