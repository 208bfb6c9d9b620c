"""Random selection: the comparator that every other method has to beat."""

import random


def random_score(sha256: str, seed: int) -> float:
    """A number in [0, 1) that depends on the adapter and the seed alone: neither on the order of
    the pool, nor on what else is in it, nor on the machine."""
    return random.Random(f"{seed}:{sha256}").random()
