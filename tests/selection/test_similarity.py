"""The paper's measures against plain dense float64, and against the authors' formulas in words."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.low_rank import SEEDS, dense, random_piece, refactored

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.selection.catalog import METHODS
from recycle_cli.selection.similarity import MEASURES, Aggregate, Target
from recycle_cli.selection.similarity import similarity as similarity_to

AGGREGATES: tuple[Aggregate, ...] = ("macro", "micro")
SHAPES = {"q": (12, 9), "k": (5, 9), "down": (9, 20), "up": (600, 500)}


def similarity(
    candidate: ModelUpdate, target: ModelUpdate, method: str, aggregate: Aggregate = "macro"
) -> float:
    return similarity_to(candidate, Target(target), method, aggregate)


@st.composite
def updates(draw: st.DrawFn) -> ModelUpdate:
    """Modules that may be missing, of mixed ranks, with scales as rsLoRA gives them."""
    modules = draw(st.lists(st.sampled_from(["q", "k", "down"]), min_size=1, unique=True))
    return {
        module: random_piece(
            draw(SEEDS),
            draw(st.integers(1, 6)),
            SHAPES[module],
            draw(st.sampled_from([0.5, 2.0, 16 / math.sqrt(6)])),
            0.1,
        )
        for module in modules
    }


def reference(candidate: ModelUpdate, target: ModelUpdate, method: str, aggregate: str) -> float:
    """The score as facts about dense matrices."""
    modules = sorted({*candidate, *target})
    pairs = []
    for module in modules:
        shape = (candidate.get(module) or target[module]).shape
        c, t = (
            dense(update[module]) if module in update else np.zeros(shape)
            for update in (candidate, target)
        )
        pairs.append((c, t))
    if method == "l2":
        return -math.log(1 + sum(float(((c - t) ** 2).sum()) for c, t in pairs))
    if method == "quasi-fim":
        pairs = [(c**2, t**2) for c, t in pairs]
    products = {
        "clamp": lambda c, t: np.maximum(c * t, 0).sum(),
        "abs": lambda c, t: np.abs(c * t).sum(),
        "clamp-pm": lambda c, t: max(0.0, (c * t).sum()),
    }
    product = products.get(method, lambda c, t: (c * t).sum())
    sums = [(float(product(c, t)), float((c**2).sum()), float((t**2).sum())) for c, t in pairs]
    if aggregate == "macro":
        p, n, m = (sum(column) for column in zip(*sums, strict=True))
        score = p / math.sqrt(n * m + 1e-6)
    else:
        score = sum(p / math.sqrt(n * m + 1e-6) for p, n, m in sums) / len(sums)
    return math.sqrt(score) if method == "quasi-fim" else score


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("method", [*MEASURES, "l2"])
@settings(max_examples=30)
@given(candidate=updates(), target=updates())
def test_each_measure_is_that_of_dense_matrices(
    candidate: ModelUpdate, target: ModelUpdate, method: str, aggregate: Aggregate
) -> None:
    found = similarity(candidate, target, method, aggregate)
    expected = reference(candidate, target, method, aggregate)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", [*MEASURES, "l2"])
def test_a_module_of_many_blocks(method: str) -> None:
    """One that is looked at in several blocks of rows."""
    candidate, target = (
        {"up": random_piece(seed, 3 + seed, SHAPES["up"], 0.5, 0.1)} for seed in (1, 2)
    )
    found = similarity(candidate, target, method)
    assert found == pytest.approx(reference(candidate, target, method, "macro"), rel=1e-6)


@pytest.mark.parametrize("method", [*MEASURES, "l2"])
@given(update=updates(), seed=SEEDS)
def test_the_factors_of_an_update_do_not_matter(
    update: ModelUpdate, method: str, seed: int
) -> None:
    target = {"q": random_piece(7, 3, SHAPES["q"])}
    other = {module: refactored(piece, seed) for module, piece in update.items()}
    found = similarity(other, target, method)
    assert found == pytest.approx(similarity(update, target, method), rel=1e-4, abs=1e-6)


def test_an_adapter_is_closest_to_itself_and_size_does_not_matter_to_a_cosine() -> None:
    one = {"q": random_piece(1, 4, SHAPES["q"]), "k": random_piece(2, 2, SHAPES["k"])}
    larger = {module: replace(piece, scale=3 * piece.scale) for module, piece in one.items()}
    assert similarity(one, one, "cosine") == pytest.approx(1, abs=1e-6)
    assert similarity(larger, one, "cosine") == pytest.approx(1, abs=1e-6)
    assert similarity(one, one, "l2") == pytest.approx(0, abs=1e-6)
    assert similarity(larger, one, "l2") < -1
    turned = {module: replace(piece, scale=-piece.scale) for module, piece in one.items()}
    assert similarity(turned, one, "cosine") == pytest.approx(-1, abs=1e-6)
    assert similarity(turned, one, "clamp-pm") == similarity(turned, one, "clamp") == 0
    assert similarity(turned, one, "abs") == pytest.approx(similarity(one, one, "abs"))


def test_nothing_in_common_is_zero_whatever_the_aggregate() -> None:
    one, other = {"q": random_piece(1, 4, SHAPES["q"])}, {"k": random_piece(2, 2, SHAPES["k"])}
    for method in MEASURES:
        for aggregate in AGGREGATES:
            assert similarity(one, other, method, aggregate) == 0


def test_the_catalog_names_every_measure() -> None:
    named = {method.name for method in METHODS.values() if method.needs == "target"}
    assert named == {*MEASURES, "l2"}
    assert {m.name for m in METHODS.values() if m.aggregates} == set(MEASURES)


def test_no_measure_of_factors_makes_a_dense_matrix() -> None:
    """At 100,000 x 100,000 a dense update would take 80 GB."""
    side = 100_000
    pieces = [random_piece(seed, 2, (side, side), spread=0.01) for seed in (1, 2)]
    one, other = ({"m": piece} for piece in pieces)
    for method in ("cosine", "clamp-pm", "l2"):
        assert math.isfinite(similarity(one, other, method))


def test_a_piece_without_rank_counts_as_missing() -> None:
    piece = random_piece(1, 4, SHAPES["q"])
    empty = LowRankUpdate(piece.A[:0], piece.B[:, :0], 1.0)
    for method in [*MEASURES, "l2"]:
        assert similarity({"q": empty}, {"q": piece}, method) == pytest.approx(
            similarity({}, {"q": piece}, method)
        )
