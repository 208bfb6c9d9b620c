import resource
import struct
import time
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import dense, random_piece, refactored

from recycle_cli.lora.fingerprint import project
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.store import duplicates
from recycle_cli.store.details import StoredProjections
from recycle_cli.store.duplicates import Group, identical_groups, similar_groups

MODULES = [f"layers.{n}.{name}" for n in range(12) for name in ("k_proj", "q_proj")]
PATHS = {1: MODULES, 2: MODULES[:12], 3: MODULES[12:]}


def stored(update: ModelUpdate, modules: int = 1) -> StoredProjections:
    projections = project(update)
    numbers = [number for path in PATHS[modules] for number in projections[path]]
    ranks = [update[path].rank for path in PATHS[modules]]
    return StoredProjections(
        modules, struct.pack(f"<{len(ranks)}i", *ranks), np.array(numbers, "<f4").tobytes()
    )


def random_update(seed: int, rank: int = 4) -> dict[str, LowRankUpdate]:
    return {
        path: random_piece(seed * 1000 + n, rank, (20, 30), 0.5) for n, path in enumerate(MODULES)
    }


def blended(one: ModelUpdate, other: ModelUpdate, cosine: float) -> dict[str, LowRankUpdate]:
    """About this cosine to the first, by what of the second is added."""
    share = (1 / cosine**2 - 1) ** 0.5
    return {
        path: LowRankUpdate(
            torch.cat([piece.A, share * other[path].A]),
            torch.cat([piece.B, other[path].B], dim=1),
            piece.scale,
        )
        for path, piece in one.items()
    }


def exact_cosine(one: ModelUpdate, other: ModelUpdate) -> float:
    x, y = (
        np.concatenate([dense(update[path]).ravel() for path in MODULES]) for update in (one, other)
    )
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def told(groups: list[Group]) -> list[tuple[str, list[int]]]:
    return [(group.relation, group.places) for group in groups]


def test_the_same_file() -> None:
    groups = identical_groups(["a", "b", None, "a", None, "b", "a", "c"])
    assert told(groups) == [("identical", [0, 3, 6]), ("identical", [1, 5])]
    assert groups[0].cosines == [1.0, 1.0, 1.0]


def test_real_updates_fall_into_the_groups_that_they_belong_to() -> None:
    base, noise = random_update(0), random_update(1)
    bfloat = {
        path: LowRankUpdate(piece.A.bfloat16().float(), piece.B.bfloat16().float(), piece.scale)
        for path, piece in base.items()
    }
    other_factors = {path: refactored(piece, 3) for path, piece in base.items()}
    higher_rank = {path: piece.padded(6) for path, piece in base.items()}
    louder = {path: LowRankUpdate(p.A, p.B, 2 * p.scale) for path, p in base.items()}
    close, far = blended(base, noise, 0.997), blended(base, noise, 0.9)
    updates: dict[int, ModelUpdate] = dict(
        enumerate([noise, base, bfloat, other_factors, higher_rank, louder, close, far])
    )
    groups = similar_groups({n: stored(one) for n, one in updates.items()}, PATHS, 0.99)
    assert told(groups) == [("same_update", [1, 2, 3]), ("near", [1, 4, 5, 6])]
    for group in groups:
        for place, cosine in zip(group.places, group.cosines, strict=True):
            exact = exact_cosine(updates[group.places[0]], updates[place])
            assert cosine == pytest.approx(exact, abs=max(1e-5, 5 * (1 - exact**2) / 14))
    # The farther one is reached through the closer one.
    assert told(similar_groups({n: stored(updates[n]) for n in (6, 7, 0)}, PATHS, 0.88)) == [
        ("near", [6, 7])
    ]


def test_modules_that_one_lacks_count_as_zero() -> None:
    whole, half = random_update(0), random_update(1)
    for path in MODULES[12:]:
        whole[path] = LowRankUpdate(whole[path].A, torch.zeros_like(whole[path].B), 1.0)
    adapters = {
        7: stored(whole),
        3: stored(whole, modules=2),
        9: stored(half, modules=3),
    }
    assert told(similar_groups(adapters, PATHS, 0.99)) == [("near", [7, 3])]


def projections(rows: np.ndarray) -> dict[int, StoredProjections]:
    """Of adapters with one module and as many numbers as a row has."""
    return {n: StoredProjections(1, b"", row.astype("<f4").tobytes()) for n, row in enumerate(rows)}


def test_what_cannot_be_compared_is_left_out() -> None:
    rows = np.ones((6, 8))
    rows[1], rows[2, 3], rows[4, 0] = 0.0, np.nan, np.inf
    assert told(similar_groups(projections(rows), {1: ["m"]}, 0.99)) == [("same_update", [0, 3, 5])]
    assert similar_groups({}, {}, 0.99) == []


def by_hand(rows: np.ndarray, threshold: float) -> list[list[int]]:
    """Connected pairs, each pair by itself, in float64."""
    groups: list[set[int]] = []
    for n, row in enumerate(rows):
        linked = [
            group
            for group in groups
            if any(
                row @ rows[m] >= threshold * np.linalg.norm(row) * np.linalg.norm(rows[m])
                for m in group
            )
        ]
        groups = [group for group in groups if group not in linked]
        groups.append({n}.union(*linked))
    found = [sorted(group) for group in groups if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group[0]))


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 9), st.floats(0.5, 0.98))
def test_groups_are_those_of_all_pairs(seed: int, count: int, block: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, 4)).astype(np.float32).astype(np.float64)
    cosines = (rows @ rows.T) / np.outer(*2 * [np.linalg.norm(rows, axis=1)])
    if np.any(np.abs(cosines - threshold) < 1e-4) or np.any(np.triu(cosines, 1) > 0.99995):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK_ROWS", block)
        groups = similar_groups(projections(rows), {1: ["m"]}, threshold)
    assert [group.places for group in groups] == by_hand(rows, threshold)


def fleet(count: int, copies: int) -> Mapping[int, StoredProjections]:
    generator = np.random.default_rng(0)
    originals = generator.normal(size=(count - copies, 224 * 8)).astype(np.float32)
    again = originals[generator.integers(0, 50, copies)]
    return projections(np.concatenate([originals, again]))


@pytest.mark.parametrize("copies", [100, 10_000])
def test_ten_thousand_adapters_take_seconds(copies: int) -> None:
    """Of the shape of a model with 224 adapted modules, even if all are copies of a few."""
    adapters = fleet(10_050, copies)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    groups = similar_groups(adapters, {1: [f"m{n}" for n in range(224)]}, 0.99)
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{seconds:.1f} s, {grown:.0f} MiB more")  # noqa: T201
    assert sum(len(group.places) - 1 for group in groups) == copies
    assert seconds < 15
    assert grown < 1000
