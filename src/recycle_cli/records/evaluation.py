"""Documents of `eval`."""

from typing import ClassVar, Literal

from pydantic import Field

from recycle_cli.records.document import AdapterRef, Document, Part, Run, TaskRef


class EvaluatedTask(TaskRef):
    """What was scored, the number of rows, and the split they are from.

    `origin` is `file` for a task of one's own and `lm-eval` for one of lm-eval's, whose `path` is
    its name. A `group` is lm-eval's, with lm-eval's own figures; `mean` stands for all tasks of the
    run, each counted alike. `members` are the tasks of a group or a mean, `num_fewshot` the
    examples in front of each prompt.
    """

    rows: int
    split: str
    kind: Literal["task", "group", "mean"] = "task"
    origin: Literal["file", "lm-eval"] = "file"
    members: list[str] = Field(default_factory=list)
    num_fewshot: int | None = 0


class PairedTest(Part):
    """A comparison with a baseline on the same rows.

    `difference` is ours minus the baseline's, over `rows` rows of `tasks` tasks, each task counted
    alike; `interval` is a paired bootstrap interval at 95 %. `adjusted_p_value` allows for how many
    comparisons were made. `equivalence_p_value` is that of the difference lying within `margin` to
    either side of zero, null where that was not asked.
    """

    baseline: str
    metric: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    rows: int = 0
    tasks: int = 1
    adjusted_p_value: float | None = None
    equivalence_p_value: float | None = None
    margin: float | None = None


class EvaluationDocument(Document, Run):
    """The metrics of one adapter (or "base") on one task.

    `form` says what was scored: the base model, an adapter on it, adapters that route, or a model
    with a merge in its weights. `metric` is the one that adapters are compared by. Of a task of
    one's own, `acc` is by log-likelihood per character, as lm-eval's `acc_norm` is, and `acc_sum`
    by summed log-likelihood; of lm-eval's tasks, names are lm-eval's, and its `acc` is the latter.
    `stderr` and `interval` (95 %) hold those metrics that have one; less is better where
    `higher_is_better` says false.
    """

    kind: ClassVar[str] = "evaluation"

    adapter: Literal["base"] | AdapterRef
    form: Literal["base", "adapter", "routed", "model"] | None = None
    base_model: str
    task: EvaluatedTask
    metric: str | None = None
    metrics: dict[str, float]
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    stderr: dict[str, float]
    interval: dict[str, tuple[float, float]]
    paired: PairedTest | None = None
    warnings: list[str] = Field(default_factory=list)
