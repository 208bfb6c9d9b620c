"""Successive halving over rows (arXiv 1502.07943): many adapters on few rows, few on many."""

import math

FEWEST_ROWS = 8
"""Fewer rows than this tell adapters apart by chance."""


def rounds(adapters: int, rows: int, k: int) -> list[tuple[int, int]]:
    """How many adapters are looked at on how many rows, round by round.

    Each round keeps the better half, at least k, and doubles the rows; the last one is on all.

    Args:
        adapters: in the pool, at least 1.
        rows: there are, at least 1.
        k: to be left in the end.
    """
    halvings = max(0, math.floor(math.log2(max(1, adapters / max(1, k)))))
    while halvings and rows / 2**halvings < FEWEST_ROWS:
        halvings -= 1
    plan = []
    left = adapters
    for number in range(halvings + 1):
        plan.append((left, math.ceil(rows / 2 ** (halvings - number))))
        left = max(min(k, adapters), math.ceil(left / 2))
    return plan
