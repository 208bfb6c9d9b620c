import pytest

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.selection.catalog import METHODS, SelectionMethod, find_selection_method


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_is_found_under_its_name(method: SelectionMethod) -> None:
    assert find_selection_method(method.name) is method
    assert method.summary
    assert method.detail.endswith(".")
    assert method.formula
    assert method.paper == "" or method.paper.startswith("arXiv ")


def test_who_needs_what() -> None:
    need_task = {name for name, method in METHODS.items() if method.needs_task}
    assert need_task == {"evaluation", "halving", "gradient", "gradient-normalised", "card"}
    need_model = {name for name, method in METHODS.items() if method.needs_model}
    assert need_model == need_task - {"card"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("evaluate", "did you mean evaluation? available: abs, card, "),
        ("RANDOM", "available: abs, card, clamp, "),
        ("randm", "did you mean random or rank? available: abs, card, "),
        ("", "available: abs, card, clamp, "),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        find_selection_method(name)
    assert caught.value.message == f"unknown selection method {name!r}"
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code is ExitCode.USAGE
