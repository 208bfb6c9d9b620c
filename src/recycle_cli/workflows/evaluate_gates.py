"""Gates of `recycle eval`: conditions that every adapter has to meet, for scripts and CI."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from recycle_cli.errors import GateNotMet, InputError
from recycle_cli.evaluation.metrics import METRICS
from recycle_cli.records import PairedTest
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.evaluate import EvalRequest, Evaluated, contenders_of
from recycle_cli.workflows.evaluate_models import Contender, find_contender
from recycle_cli.workflows.evaluate_tables import (
    Scored,
    adjusted,
    compared_over_tasks,
    tasks_of,
)

BETTER_THAN = "better-than"


@dataclass(frozen=True)
class Limit:
    """A metric must not be worse than a value; of a metric where less is better, not above it."""

    metric: str
    value: float


@dataclass(frozen=True)
class Gates:
    """What every adapter has to meet.

    Args:
        limits: by metric.
        better_than: names of those that it has to beat.
        alpha: the largest p-value that counts as having beaten them.
        target: the sha256 of the adapter that `target` means, where the piped input marks one.
    """

    limits: tuple[Limit, ...] = ()
    better_than: tuple[str, ...] = ()
    alpha: float = 0.05
    target: str | None = None


def parse_gates(
    fail_under: Sequence[str], require: Sequence[str], alpha: float, target: str | None = None
) -> Gates:
    """Gates from the command line.

    Raises:
        InputError: a gate is not METRIC=VALUE or better-than=NAME, or alpha no chance.
    """
    if not 0 < alpha < 1:  # nor is NaN
        raise InputError(f"--alpha is {alpha}", "give a chance between 0 and 1, such as 0.05")
    limits = tuple(_parse_limit(text) for text in fail_under)
    return Gates(limits, tuple(_parse_rival(text) for text in require), alpha, target)


def _parse_limit(text: str) -> Limit:
    # From the right: a filter of lm-eval's may hold an equals sign.
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    known = METRICS.get(name)
    share = known is not None and known.higher_is_better
    if not name or not math.isfinite(number) or (share and not 0 <= number <= 1):
        wanted = "acc=0.8, from 0 to 1" if share or not name else f"{name or 'acc'}=0.8"
        raise InputError(f"--fail-under is {text!r}", f"write it as in {wanted}")
    return Limit(name, number)


def _parse_rival(text: str) -> str:
    kind, _, name = text.partition("=")
    if kind != BETTER_THAN or not name:
        raise InputError(f"--require is {text!r}", f"write {BETTER_THAN}=base, =target or =ADAPTER")
    return name


def check_gates_make_sense(
    gates: Gates, request: EvalRequest, sources: Sequence[Source], computed: Collection[str]
) -> None:
    """Checks gates before anything is loaded.

    Raises:
        InputError: there is no adapter to ask, a metric is not computed here, or a rival is none
            of the adapters.
    """
    contenders = contenders_of(request, sources)
    asked = [option for option, gate in _given(gates) if gate]
    if asked and len(contenders) == 1:
        raise InputError(f"{asked[0]} asks adapters, and none is named", "name one")
    for limit in gates.limits:
        if limit.metric not in computed:
            raise InputError(
                f"--fail-under names {limit.metric!r}",
                f"computed here: {', '.join(sorted(computed))}",
            )
    for name in gates.better_than:
        rival = _find_rival(name, gates, contenders)
        if not [one for one in contenders if one.source and one != rival]:
            raise InputError(
                f"--require {BETTER_THAN}={name} asks the other adapters, and there is none",
                "name one more",
            )


def _given(gates: Gates) -> list[tuple[str, bool]]:
    return [("--fail-under", bool(gates.limits)), ("--require", bool(gates.better_than))]


def _find_rival(name: str, gates: Gates, contenders: Sequence[Contender]) -> Contender:
    return find_contender(name, contenders, f"--require {BETTER_THAN}", gates.target)


def check_gates(evaluated: Evaluated, gates: Gates, seed: int = 0) -> None:
    """Asks every adapter (not the base model) whether it meets the gates.

    Raises:
        GateNotMet: one does not; the message says which, and by how much.
    """
    for limit in gates.limits:
        for one in evaluated.scored:
            if one.contender.source:
                _check_limit(limit, one)
    for name in gates.better_than:
        _check_better_than(name, gates, evaluated.scored, seed)


def _check_limit(limit: Limit, scored: Scored) -> None:
    result = scored.result
    if limit.metric not in result.metrics:
        return
    value, higher = result.metrics[limit.metric], result.higher_is_better[limit.metric]
    # Nor is NaN good enough.
    if not (value >= limit.value if higher else value <= limit.value):
        raise GateNotMet(
            f"{scored.contender.name} has {limit.metric} {value:.4f} on {result.task.name}, "
            f"{'below' if higher else 'above'} {limit.value:g}",
            "the gate --fail-under is not met",
        )


def _check_better_than(name: str, gates: Gates, scored: Sequence[Scored], seed: int) -> None:
    """Several adapters are as many chances to be lucky, so p-values allow for that."""
    contenders = list(dict.fromkeys(one.contender for one in scored))
    rival = _find_rival(name, gates, contenders)
    asked = [one for one in contenders if one.source and one != rival]
    tests = [_against(one, rival, scored, seed) for one in asked]
    for one, test in zip(asked, adjusted([test for test, _ in tests]), strict=True):
        higher = tests[asked.index(one)][1]
        assert test is not None
        if not _beats(test, higher, gates.alpha):
            raise GateNotMet(
                f"{one.name} is not shown to be better than {rival.name}: {_figures(test)}",
                f"the gate --require {BETTER_THAN}={name} wants p below {gates.alpha:g}",
            )


def _against(
    one: Contender, rival: Contender, scored: Sequence[Scored], seed: int
) -> tuple[PairedTest, bool]:
    """A comparison with the rival, over all tasks, and whether more is better in it.

    Raises:
        GateNotMet: there is none to be had.
    """
    from recycle_cli.evaluation.row_scores import compare_rows

    ours, theirs = ([s for s in scored if s.contender == who and s.rows] for who in (one, rival))
    if len(ours) == 1 and len(theirs) == 1 and ours[0].rows and theirs[0].rows:
        result = ours[0].result
        test = compare_rows(
            ours[0].rows,
            theirs[0].rows,
            baseline_name=rival.name,
            metric=result.metric,
            seed=seed,
        )
        return test, result.higher_is_better[result.metric]
    over_tasks = compared_over_tasks(tasks_of(scored, one), tasks_of(scored, rival), seed)
    if over_tasks is None:
        raise GateNotMet(
            f"{one.name} cannot be compared with {rival.name}: the metrics give rows no scores "
            "that have a mean over tasks",
            "ask for another metric, or for one task at a time",
        )
    return over_tasks, True


def _beats(test: PairedTest, higher: bool, alpha: float) -> bool:
    from recycle_cli.evaluation.statistics import MIN_ROWS

    p_value = test.p_value if test.adjusted_p_value is None else test.adjusted_p_value
    ahead = test.difference > 0 if higher else test.difference < 0
    return ahead and p_value < alpha and test.rows >= MIN_ROWS


def _figures(test: PairedTest) -> str:
    from recycle_cli.evaluation.statistics import few_rows_warning

    p_value = test.p_value if test.adjusted_p_value is None else test.adjusted_p_value
    few = few_rows_warning(test.rows)
    return (
        f"{test.metric} differs by {test.difference:+.4f}, p = {p_value:.3g}"
        f"{f' ({few})' if few else ''}"
    )
