"""The words of a verdict: figures in brackets behind what they mean."""

from collections.abc import Sequence

from recycle_cli.evaluation.evidence import Evidence
from recycle_cli.evaluation.relevance import Relevant
from recycle_cli.records import PairedTest


def against_target(name: str, evidence: Evidence) -> str:
    """An arm beside the target LoRA, with the figures that compare them."""
    assert evidence.target is not None
    return _against_target(name, evidence, comparison(name, evidence.target, evidence))


def matching_target(name: str, evidence: Evidence) -> str:
    """The same with the figures that say that they do as well."""
    assert evidence.target is not None
    low, high = evidence.equivalences[name].interval
    difference = evidence.tests[name, evidence.target].difference
    adjusted = "adjusted p" if len(evidence.recycled) > 1 else "p"
    return _against_target(
        name,
        evidence,
        f"difference {points(difference)} points, 90 % interval {points(low)} to {points(high)}, "
        f"{adjusted} {p_value(evidence.matching[name])} for lying within {margin(evidence)}",
    )


def _against_target(name: str, evidence: Evidence, figures: str) -> str:
    assert evidence.target is not None
    examples = counted(evidence.design.examples, "example")
    return (
        f"{percent(evidence.means[name])} for {evidence.arms[name].label} against "
        f"{percent(evidence.means[evidence.target])} for a LoRA trained on the same "
        f"{examples} ({figures}, {sample(evidence)})"
    )


def against_base(name: str, evidence: Evidence) -> str:
    """An arm beside the base model, with the figures that compare them."""
    assert evidence.base is not None
    return (
        f"{percent(evidence.means[name])} for {evidence.arms[name].label} against "
        f"{percent(evidence.means[evidence.base])} for {evidence.arms[evidence.base].label} "
        f"({comparison(name, evidence.base, evidence)}, {sample(evidence)})"
    )


def rival(name: str, baseline: str, evidence: Evidence) -> str:
    """What another arm reached, with the figures that compare the two."""
    alone = " alone" if baseline == evidence.base else ""
    return (
        f"{evidence.arms[baseline].label}{alone} reached {percent(evidence.means[baseline])} "
        f"({comparison(name, baseline, evidence)})"
    )


def comparison(name: str, baseline: str, evidence: Evidence) -> str:
    """Difference, interval and p-value."""
    family = [
        pair for pair in evidence.tests if pair[1] == baseline and pair[0] in evidence.recycled
    ]
    own = [name for name in evidence.recycled if evidence.control_of(name)]
    size = len(own) if baseline == evidence.control_of(name) else len(family)
    return _figures(evidence.tests[name, baseline], evidence.p_value(name, baseline), size)


def _figures(test: PairedTest, value: float, family: int) -> str:
    low, high = test.interval
    return (
        f"difference {points(test.difference)} points, 95 % interval {points(low)} to "
        f"{points(high)}, {'adjusted p' if family > 1 else 'p'} {p_value(value)}"
    )


def sample(evidence: Evidence) -> str:
    """How much was scored; "these" where the claim is about no other tasks."""
    rows, tasks = counted(evidence.rows, "test row"), len(evidence.tasks)
    if tasks == 1:
        return rows
    return f"{rows} of {'' if evidence.over_tasks else 'these '}{tasks} tasks"


def relevant_adapter(relevant: Relevant, evidence: Evidence) -> str:
    """The adapter, the task, and why it is close to it."""
    named = relevant.adapter or "the adapter that the selection puts first"
    test = relevant.test
    examples = counted(evidence.design.examples, "example")
    figures = _figures(test, test.adjusted_p_value or 0.0, len(evidence.tasks))
    return (
        f"{named} reaches {percent(relevant.alone)} on {relevant.task} as it is, more than half of "
        f"the way from the base model's {percent(relevant.base)} to the "
        f"{percent(relevant.target)} of a LoRA trained on the same {examples} (beyond half-way by: "
        f"{figures}, {counted(test.rows, 'test row')})"
    )


def rows_that_would_tell(name: str, baseline: str, evidence: Evidence) -> str:
    """How much more it would take to say something."""
    difference, match = evidence.rows_needed(name, baseline)
    unit = "tasks" if evidence.over_tasks else "test rows"
    equal = f"about {match:,} that there is none of {margin(evidence)} or more"
    if difference is None:
        return f"about {match:,} {unit} would show that there is no difference of " + (
            f"{margin(evidence)} or more, 4 times in 5"
        )
    return (
        f"about {difference:,} {unit} would show a difference of this size, {equal}, 4 times in 5"
    )


def margin(evidence: Evidence) -> str:
    """The margin, as in `1.0 points`."""
    return f"{points(evidence.design.margin)} points"


def listed(names: Sequence[str], conjunction: str = "and") -> str:
    """As in `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {conjunction} {names[-1]}"


def counted(number: int, thing: str) -> str:
    """As in `1 row` and `2,000 rows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """As in `83.0 %`."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares in points of 100."""
    # Adding zero turns the -0.0 that rounding can leave into 0.0.
    return f"{round(100 * share, 1) + 0.0:.1f}"


def p_value(value: float) -> str:
    """As in `= 0.012` and `< 0.001`."""
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"
