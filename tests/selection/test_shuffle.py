from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recycle_cli.selection.ranking import Score, rank
from recycle_cli.selection.shuffle import random_score

POOL = [character * 64 for character in "0123456789ab"]


def chosen(pool: list[str], k: int, seed: int) -> list[str]:
    return [s.sha256 for s in rank([Score(one, random_score(one, seed)) for one in pool], k).taken]


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers())
def test_a_score_is_in_the_unit_interval_and_always_the_same(sha256: str, seed: int) -> None:
    assert 0.0 <= random_score(sha256, seed) < 1.0
    assert random_score(sha256, seed) == random_score(sha256, seed)


@pytest.mark.parametrize(
    ("sha256", "seed", "score"),
    [(POOL[0], 0, 0.7281186773215197), (POOL[10], -7, 0.5512416700818338)],
)
def test_the_scores_are_these_on_every_machine(sha256: str, seed: int, score: float) -> None:
    assert random_score(sha256, seed) == score


@given(st.permutations(POOL), st.integers(0, 1000), st.integers(1, 12))
def test_the_choice_does_not_depend_on_the_order_of_the_pool(
    pool: list[str], seed: int, k: int
) -> None:
    assert chosen(pool, k, seed) == chosen(POOL, k, seed)


@given(st.integers(0, 1000), st.sampled_from(POOL))
def test_the_others_keep_their_order_when_one_leaves(seed: int, leaver: str) -> None:
    rest = [one for one in POOL if one != leaver]
    expected = [one for one in chosen(POOL, len(POOL), seed) if one != leaver]
    assert chosen(rest, len(rest), seed) == expected


@pytest.mark.parametrize("place", [0, 5])
def test_over_the_seeds_every_adapter_takes_a_place_equally_often(place: int) -> None:
    counts = Counter(chosen(POOL, len(POOL), seed)[place] for seed in range(1200))
    assert stats.chisquare([counts[one] for one in POOL]).pvalue > 1e-3


def test_scores_of_neighbouring_seeds_are_spread_evenly() -> None:
    scores = [random_score(one, seed) for one in POOL for seed in range(200)]
    assert len(set(scores)) == len(scores)
    assert stats.kstest(scores, "uniform").pvalue > 1e-3
