import pytest

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.selection.catalog import METHODS, SelectionMethod, find_selection_method


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_is_found_under_its_name(method: SelectionMethod) -> None:
    assert find_selection_method(method.name) is method
    assert method.summary
    assert method.paper.startswith("arXiv ")


def test_only_the_shuffle_needs_no_task() -> None:
    assert {name for name, method in METHODS.items() if not method.needs_task} == {"random"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("evaluate", "did you mean evaluation? available: evaluation, random"),
        ("RANDOM", "available: evaluation, random"),
        ("randm", "did you mean random? available: evaluation, random"),
        ("", "available: evaluation, random"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        find_selection_method(name)
    assert caught.value.message == f"unknown selection method {name!r}"
    assert caught.value.hint == hint
    assert caught.value.exit_code is ExitCode.USAGE
