"""Lower the rank of an update, and say how much of it is left.

The best rank-r approximation of dW (Eckart and Young 1936) keeps its r largest singular values.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.decomposition import leading_triplets, spectrum
from recycle_cli.lora.threads import threads_for
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

NUMBER = re.compile(r"0*[1-9][0-9]{0,8}")
ENERGY = re.compile(r"energy:([0-9.]+)")


@dataclass(frozen=True)
class RankPolicy:
    """How many singular directions of each module to keep.

    Args:
        text: as the user wrote it: `full`, a number, or `energy:0.99`.
        count: given the singular values in falling order, how many to keep; None for `full`.
        limit: the number for `N`, which needs no singular values.
    """

    text: str
    count: Callable[[Tensor], int] | None
    limit: int | None = None


@dataclass(frozen=True)
class TruncatedModule:
    """One module's update at its new rank.

    Args:
        update: what is left.
        kept: its squared Frobenius norm.
        whole: that of what it was cut from. Both are 0 where nothing was cut.
    """

    update: LowRankUpdate
    kept: float = 0.0
    whole: float = 0.0

    @property
    def energy_kept(self) -> float:
        """The share of the squared norm that is left, in [0, 1]."""
        return _share(self.kept, self.whole)


@dataclass(frozen=True)
class Truncated:
    """A whole update at its new ranks, by module path."""

    modules: Mapping[str, TruncatedModule]

    @property
    def update(self) -> ModelUpdate:
        """What is left."""
        return {module: piece.update for module, piece in self.modules.items()}

    @property
    def energy_kept(self) -> float:
        """The share of the squared norm of all modules together that is left, in [0, 1]."""
        pieces = self.modules.values()
        return _share(sum(p.kept for p in pieces), sum(p.whole for p in pieces))


def parse_rank_policy(text: str, option: str = "--rank") -> RankPolicy:
    """Reads `full`, `N` (at most N in every module) or `energy:E` (the fewest directions that
    hold the share E of a module's squared Frobenius norm, 0 < E <= 1).

    Args:
        text: as the user wrote it.
        option: what it was given to, for the error.

    Raises:
        InputError: it is none of these.
    """
    if text == "full":
        return RankPolicy(text, None)
    if NUMBER.fullmatch(text):
        return RankPolicy(text, lambda values: min(int(text), len(values)), int(text))
    match = ENERGY.fullmatch(text)
    share = _number(match[1]) if match else None
    if share is not None and 0 < share <= 1:
        return RankPolicy(text, lambda values: count_for_energy(values, share))
    raise InputError(
        f"{option} is {text!r}", "use full, a whole number from 1, or energy:E with 0 < E <= 1"
    )


def count_for_energy(values: Tensor, share: float) -> int:
    """The fewest leading singular values whose squares sum to `share` of the whole; at least 1."""
    squares = values.double().square().cumsum(0)
    # Rounding may leave the last partial sum a little below the whole.
    wanted = share * squares[-1] * (1 - 1e-12)
    return min(int((squares < wanted).sum()) + 1, len(values))


def truncate(update: ModelUpdate, policy: RankPolicy) -> Truncated:
    """Lowers the rank of every module by the policy."""
    return Truncated({m: truncate_module(piece, policy) for m, piece in update.items()})


def truncate_module(update: LowRankUpdate | Tensor, policy: RankPolicy) -> TruncatedModule:
    """Lowers the rank of one module's update by the policy.

    Args:
        update: factors, or the dense matrix dW (out, in).
        policy: `full` leaves factors as they are and gives a dense matrix its exact rank.

    Returns:
        Factors in float64 that share the singular values evenly, unless they were left alone.
    """
    if policy.count is None and isinstance(update, LowRankUpdate):
        return TruncatedModule(update)
    with threads_for((update.shape[0], update.shape[1])):
        return _cut(update, policy)


def _cut(update: LowRankUpdate | Tensor, policy: RankPolicy) -> TruncatedModule:
    rank = min(*update.shape, *([update.rank] if isinstance(update, LowRankUpdate) else []))
    if policy.limit and 2 * policy.limit <= rank:
        left, values, right, whole = leading_triplets(update, policy.limit)
        return TruncatedModule(_shared(left, values, right), _energy(values), whole)
    found = spectrum(update)
    count = policy.count(found.values) if policy.count else max(1, found.rank)
    left, right = found.leading(count)
    values = found.values[:count]
    piece = _shared(left, values, right)
    if policy.count is None:
        return TruncatedModule(piece)
    return TruncatedModule(piece, _energy(values), _energy(found.values))


def _shared(left: Tensor, values: Tensor, right: Tensor) -> LowRankUpdate:
    """U S V^T with the singular values shared evenly by the factors."""
    root = values.sqrt()
    return LowRankUpdate(A=root[:, None] * right, B=left * root, scale=1.0)


def _energy(values: Tensor) -> float:
    return float(values.square().sum())


def _share(kept: float, whole: float) -> float:
    return kept / whole if whole > 0 else 1.0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
