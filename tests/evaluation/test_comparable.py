"""Only what was scored on the same tasks is compared."""

from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.evaluation.comparable import comparable

TASKS = [f"t{number}" for number in range(8)]
ANCHORS = ("base", "target")


def scored(**tasks: list[str]) -> dict[str, dict[str, str]]:
    """Each arm's scores, told apart by what they are of."""
    return {name: {task: f"{name} on {task}" for task in on} for name, on in tasks.items()}


def test_whole_studies_stay_as_they_are() -> None:
    scores = scored(base=TASKS, target=TASKS, mix=TASKS)
    found = comparable(scores, ANCHORS)
    assert found.scores == scores
    assert found.tasks_left_out == ()


def test_a_task_on_which_an_arm_failed_is_left_out_for_all() -> None:
    found = comparable(scored(base=TASKS, target=TASKS, mix=TASKS[1:], tsv=TASKS), ANCHORS)
    assert {name: list(tasks) for name, tasks in found.scores.items()} == dict.fromkeys(
        ("base", "target", "mix", "tsv"), TASKS[1:]
    )
    assert found.tasks_left_out == ("t0",)


def test_an_arm_that_failed_on_most_tasks_does_not_take_them_from_the_others() -> None:
    scores = scored(base=TASKS, target=TASKS, mix=TASKS, tsv=TASKS[:1], ties=TASKS[2:])
    found = comparable(scores, ANCHORS)
    assert list(found.scores) == ["base", "target", "mix", "ties"]
    assert found.tasks_left_out == ("t0", "t1")


def test_tasks_are_those_of_the_anchors() -> None:
    found = comparable(scored(base=TASKS, target=TASKS[:2], mix=TASKS), ANCHORS)
    assert list(found.scores["mix"]) == TASKS[:2]
    assert list(found.scores) == ["base", "target", "mix"]


def test_anchors_without_a_task_in_common_leave_nothing() -> None:
    found = comparable(scored(base=["t0"], target=["t1"], mix=TASKS), ANCHORS)
    assert found.scores == {}
    assert comparable({}, ANCHORS).scores == {}


@given(st.dictionaries(st.sampled_from("abcd"), st.sets(st.sampled_from(TASKS), min_size=1)))
def test_what_is_left_is_on_the_same_tasks(arms: dict[str, set[str]]) -> None:
    scores = scored(base=TASKS, target=TASKS, **{name: sorted(on) for name, on in arms.items()})
    found = comparable(scores, ANCHORS)
    (shared,) = {tuple(tasks) for tasks in found.scores.values()}
    assert len(shared) >= len(TASKS) / 2
    assert {*shared, *found.tasks_left_out} == set(TASKS)
    assert set(ANCHORS) <= set(found.scores)
    for name, by_task in found.scores.items():
        assert all(scores[name][task] == value for task, value in by_task.items())
