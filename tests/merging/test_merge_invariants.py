"""What holds for every merge rule, through the Merger that applies it to adapters."""

import inspect
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.low_rank import SCALES, SEEDS, dense, pieces, random_piece, refactored
from support.merging import (
    AT_DEFAULTS,
    CASES,
    DRAWING_ENTRIES,
    EQUAL_RANKS,
    Case,
    distance,
    exact_pieces,
    group_of,
    matrix,
    merger,
)
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate, zero_update
from recycle_cli.merging.catalog import METHODS, WEIGHT_USES, MergeMethod, load_rule
from recycle_cli.merging.merger import Contribution, Merger
from recycle_cli.merging.parameters import PARAMETERS

SOME = settings(max_examples=15)
FACTORS = st.floats(0.05, 20.0)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_rule = pytest.mark.parametrize("case", AT_DEFAULTS, ids=str)


def rules(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


@dataclass(frozen=True)
class Pool:
    """Updates of one module in float64, and weights that every rule takes."""

    pieces: list[LowRankUpdate]
    weights: list[float]

    @property
    def whole(self) -> float:
        """The size of what went in, which rounding is a share of."""
        return math.hypot(*(np.linalg.norm(dense(piece)) for piece in self.pieces))


@st.composite
def pools(draw: st.DrawFn, case: Case, least: int = 1) -> Pool:
    """Updates that a rule takes; no two come from the same draws."""
    count = draw(st.integers(least, case.method.most_adapters or 4))
    sides = st.integers(5, 12)
    shape = (draw(sides), draw(sides))
    ranks = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    if case.method.name in EQUAL_RANKS:
        ranks = ranks[:1] * count
    scales = draw(st.lists(SCALES, min_size=count, max_size=count))
    # From a generator: hypothesis would try weights whose votes are exactly even.
    numbers = np.random.default_rng(draw(SEEDS))
    weights = numbers.uniform(0.2, 2.0, count)
    if case.method.weights == "factors":
        weights *= numbers.choice([-1.0, 1.0], count)
    return Pool(exact_pieces(shape, ranks, scales, draw(SEEDS)), weights.tolist())


def same(one: LowRankUpdate | Tensor, other: LowRankUpdate | Tensor) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return torch.equal(one.A, other.A) and torch.equal(one.B, other.B) and one.scale == other.scale


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_row_of_the_catalog_is_complete(method: MergeMethod) -> None:
    assert METHODS[method.name] is method
    for text in (method.summary, method.detail, method.formula):
        assert text == text.strip() != ""
    assert not method.summary.endswith(".")
    assert method.detail.endswith(".")
    assert method.paper.startswith("arXiv ") or method.paper[-4:].isdigit()
    assert method.weights in WEIGHT_USES
    assert set(method.defaults) <= set(PARAMETERS)
    assert method.parameters == [PARAMETERS[name] for name in method.defaults]
    assert set(method.lossless or {}) <= set(method.defaults)
    for name, value in method.defaults.items():
        if value is not None:
            PARAMETERS[name].check(value)
            assert isinstance(value, PARAMETERS[name].kind)
    taken = inspect.signature(load_rule(method.target)).parameters
    assert list(taken) == ["group", *method.defaults]
    for part in method.split or ():
        assert list(inspect.signature(load_rule(part)).parameters) == ["group"]


def test_every_parameter_is_one_that_a_rule_takes() -> None:
    assert {name for method in METHODS.values() for name in method.defaults} == set(PARAMETERS)


LOSSLESS = [
    Case(method, method.lossless) for method in METHODS.values() if method.lossless is not None
]


@rules(*LOSSLESS)
@given(piece=pieces())
@settings(max_examples=25)
def test_one_adapter_at_weight_1_comes_back_as_it_is(case: Case, piece: LowRankUpdate) -> None:
    exact = piece.to(torch.float64)
    assert distance(case.matrix([exact]), dense(exact)) < 1e-10


@rules(*(case for case in AT_DEFAULTS if case.method.lossless is None))
def test_a_rule_that_loses_one_adapter_says_so(case: Case) -> None:
    (piece,) = exact_pieces((9, 8), (3,))
    assert distance(case.matrix([piece]), dense(piece)) > 1e-2


@every_case
@given(data=st.data())
@SOME
def test_the_order_of_the_adapters_does_not_matter(case: Case, data: st.DataObject) -> None:
    pool = data.draw(pools(case, least=2))
    there = merger(case, [{"m": piece} for piece in pool.pieces], pool.weights)
    turned = replace(there, contributions=data.draw(st.permutations(there.contributions)))
    assert same(there.merge("m"), turned.merge("m"))


@every_case
@given(data=st.data(), factor=FACTORS)
@SOME
def test_updates_that_grow_alike_give_a_result_that_grows_as_much(
    case: Case, data: st.DataObject, factor: float
) -> None:
    pool = data.draw(pools(case))
    grown = [replace(piece, scale=piece.scale * factor) for piece in pool.pieces]
    before, after = (case.matrix(some, pool.weights) for some in (pool.pieces, grown))
    assert distance(after, factor * before, factor * pool.whole) < 1e-8


@every_rule
@given(data=st.data(), factor=FACTORS)
@SOME
def test_weights_that_grow_alike(case: Case, data: st.DataObject, factor: float) -> None:
    pool = data.draw(pools(case))
    grown = [factor * weight for weight in pool.weights]
    before, after = (case.matrix(pool.pieces, some) for some in (pool.weights, grown))
    wanted = factor if case.method.weights == "factors" else 1.0
    assert distance(after, wanted * before, wanted * pool.whole) < 1e-8


@rules(*(case for case in CASES if case.method.weights == "none"))
def test_weights_that_are_not_used_do_not_matter(case: Case) -> None:
    pool = exact_pieces((9, 8), (3, 2, 2))
    assert same(case.merge(pool, [1.0, 1.0, 1.0]), case.merge(pool, [-2.0, 0.0, 2.0]))


@every_rule
def test_weights_that_cancel_are_refused_where_the_rule_divides_by_them(case: Case) -> None:
    pool = exact_pieces((9, 8), (3, 3))
    if case.method.weights in ("shares", "convex"):
        with pytest.raises(InputError, match="sum to 0"):
            case.merge(pool, [1.0, -1.0])
    else:
        assert np.isfinite(case.matrix(pool, [1.0, -1.0])).all()


@rules(*(case for case in CASES if case.method.invariant))
@given(data=st.data(), seed=SEEDS)
@SOME
def test_only_the_updates_count_not_their_factors(
    case: Case, data: st.DataObject, seed: int
) -> None:
    pool = data.draw(pools(case))
    others = [
        refactored(piece, (seed + number) % 2**32) for number, piece in enumerate(pool.pieces)
    ]
    one, other = (case.matrix(some, pool.weights) for some in (pool.pieces, others))
    assert distance(other, one, pool.whole) < 1e-7


@rules(*(case for case in AT_DEFAULTS if not case.method.invariant))
def test_a_rule_for_which_the_factors_count_says_so(case: Case) -> None:
    pool = exact_pieces((9, 8), (3, 3))
    others = [refactored(pool[0], 0), pool[1]]
    assert distance(dense(others[0]), dense(pool[0])) < 1e-12
    assert distance(case.matrix(others), case.matrix(pool)) > 1e-2


@every_case
@given(data=st.data(), more=st.integers(1, 3))
@SOME
def test_components_of_zero_change_nothing(case: Case, data: st.DataObject, more: int) -> None:
    pool = data.draw(pools(case, least=min(2, case.method.most_adapters or 2)))
    padded = [piece.padded(piece.rank + more) for piece in pool.pieces]
    one, other = (case.matrix(some, pool.weights) for some in (pool.pieces, padded))
    assert distance(other, one, pool.whole) < 1e-7


@every_case
@pytest.mark.parametrize("seed", range(3))
def test_factors_read_from_bfloat16_lose_no_more_than_float32_does(case: Case, seed: int) -> None:
    ranks = (3, 3) if case.method.name in EQUAL_RANKS | {"slerp"} else (3, 2, 4)
    stored = [piece.to(torch.bfloat16) for piece in exact_pieces((12, 9), ranks, seed=10 * seed)]
    single, double = ([p.to(dtype) for p in stored] for dtype in (torch.float32, torch.float64))
    assert distance(case.matrix(single), case.matrix(double)) < 1e-5


@dataclass(frozen=True)
class Sparse:
    """Whole updates of two modules, of which only some have the second."""

    updates: list[ModelUpdate]
    weights: list[float]
    having: list[int]


@st.composite
def sparse(draw: st.DrawFn, case: Case) -> Sparse:
    pool = draw(pools(case, least=2))
    count = len(pool.pieces)
    having = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1)))
    other = exact_pieces((7, 6), [pool.pieces[0].rank] * count, [0.7] * count, draw(SEEDS))
    updates = [
        {"a": piece, **({"b": other[number]} if number in having else {})}
        for number, piece in enumerate(pool.pieces)
    ]
    return Sparse(updates, pool.weights, having)


@every_case
@given(data=st.data())
@SOME
def test_modules_that_some_adapters_lack(case: Case, data: st.DataObject) -> None:
    pool = data.draw(sparse(case))
    zero, skip = (merger(case, pool.updates, pool.weights, absent=how) for how in ("zero", "skip"))
    assert zero.shapes == skip.shapes == {"a": pool.updates[0]["a"].shape, "b": (7, 6)}
    explicit = [{"b": zero_update((7, 6)), **update} for update in pool.updates]
    filled = merger(case, explicit, pool.weights).merge("b")
    assert same(zero.merge("b"), filled)
    only = replace(skip, contributions=[skip.contributions[number] for number in pool.having])
    assert same(skip.merge("b"), only.merge("b"))
    assert same(skip.merge("a"), zero.merge("a"))
    if not case.method.absent_counts:
        assert same(zero.merge("b"), skip.merge("b"))


@pytest.mark.parametrize(
    "case", [case for case in AT_DEFAULTS if case.method.absent_counts], ids=str
)
def test_a_rule_for_which_absent_modules_count_says_so(case: Case) -> None:
    first, second, third = exact_pieces((20, 15), (6, 6, 6))
    updates: list[ModelUpdate] = [
        {"a": first, "b": second},
        {"a": third, "b": first},
        {"a": second},
    ]
    updates = updates[-case.method.most_adapters :] if case.method.most_adapters else updates
    zero, skip = (matrix(merger(case, updates, absent=how).merge("b")) for how in ("zero", "skip"))
    assert distance(zero, skip) > 1e-2


@every_case
def test_an_update_of_nothing_is_merged(case: Case) -> None:
    one, other = (
        replace(piece, B=torch.zeros_like(piece.B)) for piece in exact_pieces((7, 6), (2, 2))
    )
    nothing = replace(one, A=torch.zeros_like(one.A), B=torch.ones_like(one.B))
    mixed = [] if case.method.name in EQUAL_RANKS else [[one, nothing]]
    for pool in ([one], [one, other], [nothing, nothing], *mixed):
        merged = case.merge(pool)
        assert tuple(merged.shape) == (7, 6)
        assert not matrix(merged).any()
        assert isinstance(merged, Tensor) or merged.rank > 0


@every_case
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_modules_of_any_shape(case: Case, shape: tuple[int, int]) -> None:
    pool = exact_pieces(shape, (3, 3))
    for count in (1, 2):
        found = case.matrix(pool[:count])
        assert found.shape == shape
        assert np.isfinite(found).all()


DRAWING = [
    case
    for case in CASES
    if case.method.name in DRAWING_ENTRIES | {"knots-dare"} or case.given.get("inner") == "dare"
]


@every_case
def test_only_what_draws_depends_on_the_seed(case: Case) -> None:
    pool = exact_pieces((12, 10), (3, 3))
    again, other = case.merge(pool), case.merge(pool, seed=1)
    assert same(case.merge(pool), again)
    if case in DRAWING:
        assert not same(again, other)
    elif case.method.name != "lora-lego":
        assert same(again, other)


@rules(*DRAWING)
def test_what_is_drawn_differs_from_module_to_module(case: Case) -> None:
    updates = [{"a": piece, "b": piece} for piece in exact_pieces((12, 10), (3, 3))]
    there = merger(case, updates)
    assert distance(matrix(there.merge("a")), matrix(there.merge("b"))) > 1e-2
    # Nor does it matter which came first.
    assert same(merger(case, updates).merge("b"), there.merge("b"))


def test_what_is_drawn_for_an_adapter_does_not_depend_on_the_others() -> None:
    case = Case(METHODS["dare-linear"])
    one, two, three = exact_pieces((12, 10), (3, 2, 4))
    together = case.matrix([one, two, three])
    without = case.matrix([one, zero_update((12, 10)), three])
    alone = matrix(case.rule()(replace(group_of([two]), keys=("0:adapter-1:m",))))
    assert distance(together, without + alone) < 1e-12


def test_the_merged_update_has_the_modules_of_all_in_order() -> None:
    piece = random_piece(0, 2, (5, 4))
    asked: list[str] = []

    def read(module: str) -> LowRankUpdate:
        asked.append(module)
        return piece

    contributions = [
        Contribution(key, 1.0, dict.fromkeys(modules, (5, 4)), read)
        for key, modules in (("k", ["m.c", "m.a"]), ("l", ["m.b", "m.a"]))
    ]
    there = Merger(Case(METHODS["linear"]).rule(), contributions)
    assert list(there.shapes.items()) == [(module, (5, 4)) for module in ("m.a", "m.b", "m.c")]
    assert asked == []
    assert distance(matrix(there.merge("m.a")), 2 * dense(piece)) < 1e-12
    assert asked == ["m.a", "m.a"]
    assert distance(matrix(there.merge("m.c")), dense(piece)) < 1e-12
    assert asked == ["m.a", "m.a", "m.c"]


def test_shares_are_the_weights_divided_by_their_sum() -> None:
    pool = exact_pieces((5, 4), (1, 1, 1))
    assert group_of(pool, [1.0, 2.0, 5.0]).shares == [0.125, 0.25, 0.625]
    assert math.isclose(sum(group_of(pool, [0.1, -0.7, 0.3]).shares), 1.0)
