"""A study's records, found by the names of arms and tasks."""

from functools import cached_property

from recycle_cli.records import (
    StudyArm,
    StudyComparison,
    StudyDocument,
    StudyMean,
    StudyRow,
)

Pair = tuple[str, str, str | None]

METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy (normalised)",
    "exact_match": "exact match",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
}


class StudyIndex:
    """Answers the questions that tables and plots ask of a study."""

    def __init__(self, study: StudyDocument) -> None:
        self.study = study

    @cached_property
    def arms(self) -> dict[str, StudyArm]:
        """The arms by name, in the study's order."""
        return {arm.name: arm for arm in self.study.arms}

    @cached_property
    def reference(self) -> StudyArm | None:
        """What all arms are compared with: the target LoRA, or the base model without one."""
        for role in ("target", "base"):
            for arm in self.study.arms:
                if arm.role == role:
                    return arm
        return None

    @cached_property
    def means(self) -> list[StudyMean]:
        """The arms' means, the highest first; those over fewer tasks, which are no rivals, last."""
        return sorted(self.study.means, key=lambda mean: (-mean.tasks, -mean.value))

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds of all cells."""
        return sorted({row.seed for row in self.study.table})

    @property
    def metric(self) -> str:
        """What the means are in, as people call it."""
        return metric_words(self.study.metric)

    def label(self, name: str) -> str:
        """What sentences call an arm."""
        arm = self.arms.get(name)
        return arm.label if arm else name

    def mean(self, name: str) -> StudyMean | None:
        """An arm over all tasks."""
        return self._means.get(name)

    def rows(self, name: str, task: str | None = None) -> list[StudyRow]:
        """The cells of an arm, by task and seed."""
        rows = self._rows.get(name, [])
        return [row for row in rows if task is None or row.task == task]

    def comparison(
        self, name: str, baseline: str, task: str | None = None
    ) -> StudyComparison | None:
        """An arm against a baseline, over all tasks or on one."""
        return self._comparisons.get((name, baseline, task))

    def no_difference(self, name: str) -> float | None:
        """The adjusted p-value of an arm being as good as the reference, to within the margin."""
        if self.reference is None:
            return None
        figure = f"adjusted_equivalence_p_value.{name}.{self.reference.name}"
        return self.study.verdict.figures.get(figure)

    @property
    def margin(self) -> float | None:
        """The largest difference that does not matter, where the verdict has one."""
        return self.study.verdict.figures.get("margin")

    @cached_property
    def _means(self) -> dict[str, StudyMean]:
        return {mean.method: mean for mean in self.study.means}

    @cached_property
    def _rows(self) -> dict[str, list[StudyRow]]:
        by_arm: dict[str, list[StudyRow]] = {}
        for row in sorted(self.study.table, key=lambda row: (row.task, row.seed)):
            by_arm.setdefault(row.method, []).append(row)
        return by_arm

    @cached_property
    def _comparisons(self) -> dict[Pair, StudyComparison]:
        return {(c.method, c.baseline, c.task): c for c in self.study.comparisons}


def adjusted(comparison: StudyComparison) -> float:
    """The p-value with allowance for the number of comparisons, where one was made."""
    if comparison.adjusted_p_value is None:
        return comparison.p_value
    return comparison.adjusted_p_value


def metric_words(name: str) -> str:
    """What people call a metric."""
    return METRICS.get(name, name)


def first_metric(row: StudyRow) -> tuple[str, float]:
    """The metric that a row's interval is of, and its value."""
    return next(iter(row.metrics.items()))
