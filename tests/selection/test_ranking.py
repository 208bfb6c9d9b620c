import math
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.selection.ranking import Score, rank

# Few values, so that ties are common; -inf is the mean of log-likelihoods that underflow.
VALUES = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 1.0])
SCORES = st.builds(Score, st.text("0123456789abcdef", min_size=1, max_size=4), VALUES, VALUES)
POOLS = st.lists(SCORES, min_size=1, max_size=8, unique_by=lambda score: score.sha256)
KS = st.integers(1, 10)


def better(one: Score, other: Score) -> bool:
    """Whether one comes before the other: by value, then tie-breaker, then name."""
    if one.value != other.value:
        return one.value > other.value
    if one.tie_breaker != other.tie_breaker:
        return one.tie_breaker > other.tie_breaker
    return one.sha256 < other.sha256


@given(POOLS, KS)
def test_nobody_left_out_is_better_than_anybody_taken(pool: list[Score], k: int) -> None:
    ranking = rank(pool, k)
    taken = ranking.taken
    left = [score for score in pool if score not in taken]
    assert len(taken) == min(k, len(pool))
    assert len(left) == len(pool) - len(taken)
    assert all(better(one, other) for one, other in pairwise(taken))
    assert all(better(taken[-1], other) for other in left)
    assert ranking.tied_at_cut == [score.value for score in left].count(taken[-1].value)


@given(POOLS, KS, st.data())
def test_the_order_of_the_pool_never_decides(
    pool: list[Score], k: int, data: st.DataObject
) -> None:
    assert rank(data.draw(st.permutations(pool)), k) == rank(pool, k)


@given(POOLS, KS)
def test_taking_more_keeps_those_taken_before(pool: list[Score], k: int) -> None:
    assert rank(pool, k + 1).taken[:k] == rank(pool, k).taken


@pytest.mark.parametrize(
    ("k", "taken", "tied"), [(1, "d", 0), (2, "db", 2), (3, "dba", 1), (4, "dbac", 0), (9, None, 0)]
)
def test_ties_are_broken_and_those_at_the_cut_counted(k: int, taken: str, tied: int) -> None:
    pool = [Score("c", 0.5, -2.0), Score("a", 0.5, -2.0), Score("b", 0.5, -1.0)]
    pool += [Score("d", 0.75, -9.0), Score("e", 0.25, 0.0)]
    ranking = rank(pool, k)
    assert "".join(score.sha256 for score in ranking.taken) == (taken or "dbace")
    assert ranking.tied_at_cut == tied


def test_a_tie_breaker_that_is_no_number_leaves_the_order_to_the_rest() -> None:
    pool = [Score("a", 0.5, math.nan), Score("b", 0.5, -1.0), Score("c", 0.5, -3.0)]
    orders = {tuple(score.sha256 for score in rank(order, 3).taken) for order in permutations(pool)}
    assert len(orders) == 1


def test_nothing_can_be_taken_from_nothing() -> None:
    assert (rank([], 3).taken, rank([], 3).tied_at_cut) == ([], 0)
