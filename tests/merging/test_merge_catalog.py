import math

import pytest

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.merging.catalog import METHODS, MergeMethod, find_merge_method
from recycle_cli.merging.parameters import PARAMETERS
from recycle_cli.parameters import Value

NAMES = ", ".join(sorted(METHODS))


def refusal(method: str, **given: Value) -> InputError:
    with pytest.raises(InputError) as caught:
        METHODS[method].settings(given)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_what_is_not_given_is_at_its_default(method: MergeMethod) -> None:
    assert find_merge_method(method.name) is method
    assert method.settings({}) == method.defaults
    assert method.settings(dict.fromkeys(PARAMETERS)) == method.defaults


def test_what_is_given_is_in_force() -> None:
    ties = METHODS["ties"]
    assert ties.settings({"density": 0.3}) == {"density": 0.3, "normalize": "count"}
    assert ties.settings({"normalize": "weights"}) == {"density": 0.2, "normalize": "weights"}
    assert ties.defaults == {"density": 0.2, "normalize": "count"}
    assert METHODS["tsv"].settings({"components": 7}) == {"components": 7}


BAD: list[tuple[str, str, Value, str]] = [
    *(
        (method, "density", density, "a number in (0, 1]")
        for method in ("ties", "dare-linear", "sce", "knots-ties", "magnitude-prune")
        for density in (0.0, 0, 1.0001, -1.0, math.nan, math.inf, -math.inf)
    ),
    *(("breadcrumbs", "gamma", gamma, "a number in [0, 1]") for gamma in (-0.1, 1.5, math.nan)),
    *(("della", "epsilon", epsilon, "a number in [0, 1]") for epsilon in (-0.1, 1.5, math.nan)),
    *(("lora-lego", "clusters", clusters, "a whole number from 1") for clusters in (0, -3)),
    ("tsv", "components", 0, "a whole number from 1"),
    ("compress-then-merge", "shared_rank", 0, "a whole number from 1"),
    ("core-space", "inner", "tsv", "one of linear, ties, dare"),
    ("core-space", "inner", "", "one of linear, ties, dare"),
    ("compress-then-merge", "inner", "Linear", "one of linear, ties, dare"),
    ("ties", "normalize", "sum", "one of count, weights"),
    ("della", "normalize", "counts", "one of count, weights"),
    ("ties", "density", "0.5", "a number in (0, 1]"),
]


@pytest.mark.parametrize(("method", "name", "value", "allowed"), BAD)
def test_values_out_of_range(method: str, name: str, value: Value, allowed: str) -> None:
    error, option = refusal(method, **{name: value}), PARAMETERS[name].option
    if not PARAMETERS[name].choices:
        assert error.message == f"{option} is {value!r}"
        assert error.hint == f"use {allowed}"
        return
    assert error.message == f"unknown {option} {value!r}"
    for choice in allowed.removeprefix("one of ").split(", "):
        assert choice in error.hint


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1}),
        ("ties", {"density": 1e-9}),
        ("breadcrumbs", {"density": 1.0, "gamma": 1.0}),
        ("breadcrumbs", {"gamma": 0.0}),
        ("della", {"density": 0.5, "epsilon": 0.0}),
        ("della", {"density": 1.0, "epsilon": 1.0}),
        ("della", {"density": 0.75, "epsilon": 0.25}),
        ("lora-lego", {"clusters": 1}),
        ("core-space", {"inner": "dare", "density": 0.5}),
        ("core-space", {"density": 0.5}),
        ("core-space", {"inner": "linear"}),
        ("compress-then-merge", {"inner": "ties", "density": 0.5, "shared_rank": 1}),
    ],
)
def test_values_at_the_end_of_their_range(method: str, given: dict[str, Value]) -> None:
    settings = METHODS[method].settings(given)
    assert {name: settings[name] for name in given} == given


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"density": 0.05}, "--density 0.05 and --epsilon 0.1 ask for probabilities from -0.05"),
        ({"density": 0.95}, "to 1.05"),
        ({"epsilon": 0.5}, "from 0 to 1"),
        ({"epsilon": 0.7}, "from -0.2 to 1.2"),
        ({"density": 0.3, "epsilon": 0.3}, "from 0 to 0.6"),
    ],
)
def test_probabilities_lie_between_0_and_1(given: dict[str, Value], asked: str) -> None:
    error = refusal("della", **given)
    assert asked in error.message
    assert "(0, 1]" in error.hint


def test_probabilities_of_a_whole_epsilon() -> None:
    refusal("della", density=0.5, epsilon=1)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_without_effect_is_refused(method: str, name: str) -> None:
    takers = [other.name for other in METHODS.values() if name in other.defaults]
    assert takers
    if method in takers:
        assert name in METHODS[method].settings({})
        return
    # Whatever its value: that it has no effect is what matters.
    error = refusal(method, **{name: math.nan})
    option = "--" + name.replace("_", "-")
    assert error.message == f"{option} has no effect with --method {method}"
    assert error.hint == f"leave it out, or use one of: {', '.join(takers)}"


@pytest.mark.parametrize("given", [{"inner": "linear"}, {}])
def test_linear_inside_has_no_density(given: dict[str, Value]) -> None:
    # compress-then-merge has linear inside unless told otherwise.
    error = refusal("compress-then-merge", density=0.3, **given)
    assert error.message == "--density has no effect with --inner linear"
    error = refusal("core-space", density=0.3, inner="linear")
    assert error.message == "--density has no effect with --inner linear"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("avrage", "did you mean average"),
        ("Linear", "did you mean linear"),
        ("tie", "did you mean ties"),
        ("knots", "did you mean knots-"),
        ("", "available: "),
        ("zzz", "available: "),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        find_merge_method(name)
    assert caught.value.message == f"unknown merge method {name!r}"
    assert caught.value.hint.startswith(hint)
    assert caught.value.hint.endswith(f"available: {NAMES}")
    assert caught.value.exit_code is ExitCode.USAGE


def test_options_are_named_after_parameters() -> None:
    assert {name: parameter.name for name, parameter in PARAMETERS.items()} == {
        name: name for name in PARAMETERS
    }
    assert PARAMETERS["shared_rank"].option == "--shared-rank"
    for parameter in PARAMETERS.values():
        assert parameter.help.endswith(".")
