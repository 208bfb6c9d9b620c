"""The tests that a verdict rests on: every arm against the base model and the target LoRA, every
recycled arm against its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recycle_cli.evaluation.arms import Arm, Role
from recycle_cli.evaluation.bootstrap import MANY_TASKS
from recycle_cli.evaluation.comparison import Equivalence, compare, equivalence, with_holm
from recycle_cli.evaluation.differences import (
    Rows,
    Scores,
    mean_of_means,
    mean_scores,
    row_differences,
)
from recycle_cli.evaluation.power import (
    moments,
    rows_needed,
    rows_needed_to_match,
    tasks_needed_to_match,
)
from recycle_cli.evaluation.sign_flips import task_sign_flips
from recycle_cli.evaluation.statistics import holm
from recycle_cli.records import PairedTest

ALPHA = 0.05

Pair = tuple[str, str]


@dataclass(frozen=True)
class Design:
    """How the arms are compared.

    Args:
        metric: the name of the metric, for the records.
        examples: how many examples the target LoRA was trained on.
        margin: the largest difference that does not matter, in (0, 1).
        relevance: task -> the adapter that the selection put first.
        seed: of what is drawn.
        draws: how many resamples and flips.
    """

    metric: str
    examples: int
    margin: float
    relevance: Mapping[str, str]
    seed: int
    draws: int


class Evidence:
    """The arms that were scored, and their tests.

    Args:
        scores: arm -> task -> scores in [0, 1], (seeds, rows) or (rows,); every arm on the same
            tasks and rows.
        arms: their parts; those without scores were not run.
        design: how they are compared.

    Raises:
        ValueError: as `compare`; scores of no arm; or a control that does not match its arm.
    """

    def __init__(self, scores: Mapping[str, Scores], arms: Sequence[Arm], design: Design) -> None:
        _check(scores, arms)
        self.design = design
        self.arms = {arm.name: arm for arm in arms if scores.get(arm.name)}
        self.unscored = [arm for arm in arms if arm.name not in self.arms]
        self.scores = {name: mean_scores(scores[name]) for name in self.arms}
        self.means = {
            name: mean_of_means(list(by_task.values())) for name, by_task in self.scores.items()
        }
        first: dict[str, Rows] = next(iter(self.scores.values()), {})
        self.tasks = list(first)
        self.rows = sum(rows.size for rows in first.values())
        self.base = self._only(Role.BASE)
        self.target = self._only(Role.TARGET)
        self.rescaled = self._only(Role.RESCALED)

    def _only(self, role: Role) -> str | None:
        return next((arm.name for arm in self.arms.values() if arm.role is role), None)

    @cached_property
    def recycled(self) -> list[str]:
        """The recycled arms, the one with the highest mean first."""
        found = [arm.name for arm in self.arms.values() if arm.role is Role.RECYCLED]
        return sorted(found, key=lambda name: -self.means[name])

    @property
    def over_tasks(self) -> bool:
        """Whether tests are over tasks, and claims about tasks like these."""
        return len(self.tasks) >= MANY_TASKS

    # --- tests ---

    @cached_property
    def tests(self) -> dict[Pair, PairedTest]:
        """(arm, baseline) -> test, adjusted for its family."""
        tests: dict[Pair, PairedTest] = {}
        for family in self._families():
            compared = [self._compare(*pair) for pair in family]
            tests.update(zip(family, self._adjusted(family, compared), strict=True))
        for name, found in self.equivalences.items():
            pair = (name, str(self.target))
            told = {"equivalence_p_value": found.p_value, "margin": found.margin}
            tests[pair] = tests[pair].model_copy(update=told)
        return tests

    def _families(self) -> list[list[Pair]]:
        """The recycled arms are a family against each baseline, and the others one of their own:
        a verdict may name any of the former, and none of the latter."""
        recycled = [name for name in self.arms if name in self.recycled]
        others = [name for name in self.arms if name not in self.recycled]
        anchors = [anchor for anchor in (self.base, self.target) if anchor is not None]
        families = [
            [(name, anchor) for name in names if name != anchor]
            for anchor in anchors
            for names in (recycled, others)
        ]
        families.append(
            [(name, control) for name in recycled if (control := self.control_of(name))]
        )
        families.append([(name, self.rescaled) for name in recycled if self.rescaled])
        return [family for family in families if family]

    def control_of(self, name: str) -> str | None:
        """The arm's matched control, where it was scored."""
        control = self.arms[name].control
        return control if control in self.arms else None

    def _compare(self, name: str, baseline: str) -> PairedTest:
        return compare(
            self.scores[name],
            self.scores[baseline],
            baseline_name=baseline,
            metric=self.design.metric,
            seed=self.design.seed,
            draws=self.design.draws,
        )

    def _adjusted(self, family: list[Pair], tests: list[PairedTest]) -> list[PairedTest]:
        if not self.over_tasks:
            return with_holm(tests)
        by_task = [[rows.mean() for rows in self.differences(*pair)] for pair in family]
        _, adjusted = task_sign_flips(np.array(by_task), self.design.seed, self.design.draws)
        return [
            test.model_copy(update={"adjusted_p_value": p_value})
            for test, p_value in zip(tests, adjusted, strict=True)
        ]

    def differences(self, name: str, baseline: str) -> list[Rows]:
        """The rows' differences, task by task."""
        return row_differences(self.scores[name], self.scores[baseline])

    @cached_property
    def equivalences(self) -> dict[str, Equivalence]:
        """Recycled arm -> whether it does as well as the target LoRA."""
        if self.target is None:
            return {}
        return {name: self._equivalence(name, self.target) for name in self.recycled}

    def _equivalence(self, name: str, baseline: str) -> Equivalence:
        design = self.design
        return equivalence(
            self.scores[name], self.scores[baseline], design.margin, design.seed, design.draws
        )

    @cached_property
    def matching(self) -> dict[str, float]:
        """Recycled arm -> the p-value of its equivalence to the target LoRA, after Holm."""
        found = self.equivalences
        adjusted = holm([one.p_value for one in found.values()])
        return dict(zip(found, adjusted, strict=True))

    # --- what they show ---

    def p_value(self, name: str, baseline: str) -> float:
        """The adjusted one."""
        test = self.tests[name, baseline]
        return test.p_value if test.adjusted_p_value is None else test.adjusted_p_value

    def beats(self, name: str, baseline: str | None) -> bool:
        """Whether an arm is better than another one, beyond chance."""
        return baseline is not None and self._sign(name, baseline) > 0

    def loses_to(self, name: str, baseline: str | None) -> bool:
        """Whether an arm is worse than another one, beyond chance."""
        return baseline is not None and self._sign(name, baseline) < 0

    def _sign(self, name: str, baseline: str) -> float:
        significant = self.p_value(name, baseline) < ALPHA
        return self.tests[name, baseline].difference if significant else 0.0

    def gains_less_than_margin(self, name: str) -> bool:
        """Whether an arm is shown, one-sided at 5 %, to gain less over the base model than what
        matters."""
        assert self.base is not None
        return self._equivalence(name, self.base).interval[1] < self.design.margin

    def rows_needed(self, name: str, baseline: str) -> tuple[int | None, int]:
        """How many rows (tasks, where tests are over tasks) would show a difference of the size
        observed, and how many that there is none that matters."""
        difference, spread = moments(self.differences(name, baseline))
        match = tasks_needed_to_match if self.over_tasks else rows_needed_to_match
        return rows_needed(difference, spread), match(spread, self.design.margin)


def _check(scores: Mapping[str, Scores], arms: Sequence[Arm]) -> None:
    by_name = {arm.name: arm for arm in arms}
    if unknown := sorted(set(scores) - set(by_name)):
        raise ValueError(f"scores of {', '.join(unknown)}, which are no arms")
    for arm in arms:
        control = by_name.get(arm.control or "")
        if control is not None and control.has_target != arm.has_target:
            raise ValueError(
                f"{control.name} is no control of {arm.name}: the target LoRA stands on one side"
            )
