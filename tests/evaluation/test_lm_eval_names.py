"""lm-eval's tasks by name: found, loaded offline, refused in plain words."""

from pathlib import Path
from typing import Any

import pytest

from recycle_cli.errors import InputError
from recycle_cli.evaluation.lm_eval_names import load_named_task, main_metric


def test_a_task_is_loaded_from_files_without_a_network(tiny_tasks: Path) -> None:
    task = load_named_task("tiny_text", tiny_tasks, offline=True)
    assert task.metrics() == {"tiny_text": {"exact_match,strict", "exact_match,loose"}}
    group = load_named_task("tiny_group", tiny_tasks, offline=True)
    assert group.metrics() == {"tiny_choice": {"acc", "acc_norm"}, "tiny_f1": {"acc", "f1"}}


def test_the_number_of_examples_is_lm_evals_unless_given(tiny_tasks: Path) -> None:
    def shots(asked: int | None) -> Any:
        loaded = load_named_task("tiny_choice", tiny_tasks, asked).loaded
        return loaded["tasks"]["tiny_choice"].config.num_fewshot

    assert [shots(None), shots(3)] == [0, 3]


def test_data_that_are_not_here_are_named(tiny_tasks: Path) -> None:
    with pytest.raises(InputError, match="needs the data set 'no/such-data'") as caught:
        load_named_task("tiny_missing", tiny_tasks, offline=True)
    assert "not in this machine's cache" in caught.value.message
    assert "without --offline" in caught.value.hint


def test_lm_evals_own_tasks_are_known_by_name_and_their_data_named() -> None:
    with pytest.raises(InputError, match="needs the data set 'allenai/ai2_arc'"):
        load_named_task("arc_easy", offline=True)
    with pytest.raises(InputError, match="there is no task 'arc_esy'") as caught:
        load_named_task("arc_esy", offline=True)
    assert "did you mean arc_easy" in caught.value.hint


def test_tasks_that_run_what_the_model_writes_are_refused(
    tiny_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask  # type: ignore[import-untyped]

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(InputError, match="runs code that the model writes"):
        load_named_task("tiny_choice", tiny_tasks)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is no folder"):
        load_named_task("tiny_choice", tmp_path / "none")


@pytest.mark.parametrize(
    ("reported", "asked", "expected"),
    [
        (("acc", "acc_norm"), None, "acc_norm"),
        (("acc", "f1"), None, "acc"),
        (("exact_match,strict", "exact_match,loose"), None, "exact_match,loose"),
        (("exact_match,strict", "exact_match,loose"), "exact_match,strict", "exact_match,strict"),
        (("exact_match,strict",), "exact_match", "exact_match,strict"),
        (("bleu",), None, "bleu"),
        (("acc",), "f1", None),
    ],
)
def test_the_metric_to_compare_by(
    reported: tuple[str, ...], asked: str | None, expected: str | None
) -> None:
    assert main_metric(reported, asked) == expected
