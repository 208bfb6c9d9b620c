import numpy as np
import pytest
from support.low_rank import dense_all, random_piece

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.merging.catalog import METHODS, MergeMethod, find_merge_method

UPDATE = {"m.a": random_piece(0, 3, (5, 4), 0.7), "m.b": random_piece(1, 2, (3, 6), -2.0)}


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_is_found_and_merges(method: MergeMethod) -> None:
    assert find_merge_method(method.name) is method
    assert method.summary
    assert method.paper.startswith("arXiv ")
    merged = method.load()([UPDATE, {"m.a": UPDATE["m.a"]}], [1.0, 2.0])
    assert {m: piece.shape for m, piece in merged.items()} == {"m.a": (5, 4), "m.b": (3, 6)}
    assert all(np.isfinite(matrix).all() for matrix in dense_all(merged).values())


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_weights_that_cancel_work_where_the_catalog_says_so(method: MergeMethod) -> None:
    rule, pool, weights = method.load(), [UPDATE, UPDATE], [1.0, -1.0]
    if method.weights_may_sum_to_zero:
        assert all(np.isfinite(matrix).all() for matrix in dense_all(rule(pool, weights)).values())
    else:
        with pytest.raises(ZeroDivisionError):
            rule(pool, weights)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("avrage", "did you mean average? available: average, linear"),
        ("Linear", "did you mean linear? available: average, linear"),
        ("", "available: average, linear"),
        ("zzz", "available: average, linear"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        find_merge_method(name)
    assert caught.value.message == f"unknown merge method {name!r}"
    assert caught.value.hint == hint
    assert caught.value.exit_code is ExitCode.USAGE
