"""Singular values and vectors of low-rank updates, without forming the dense matrix.

B = Q_B R_B and A^T = Q_A R_A, and the SVD of the small core s R_B R_A^T (rank x rank) gives the
singular values of dW = s B A; Q_B and Q_A turn its singular vectors into those of dW. Both Q stay
products of reflections, so that only the vectors that are asked for are ever formed. All of it is
float64, which costs little here and makes it exact.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate

WHOLE_SIDE = 128
"""Up to this side, all eigenpairs of a matrix come as fast as some of them."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update, and its singular vectors on demand.

    Args:
        values: (k,), float64, in falling order.
        rank: how many of them are not zero up to rounding.
        leading: given count <= k, U (out, count) and V^T (count, in) of the largest values.
    """

    values: Tensor
    rank: int
    leading: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Core:
    """A small matrix with the singular values of an update, and the way back from its vectors.

    Args:
        matrix: (k, l), float64.
        turn_left: x (k, n) -> (out, n), a product with orthonormal columns.
        turn_right: x (l, n) -> (in, n), the same on the other side.
    """

    matrix: Tensor
    turn_left: Callable[[Tensor], Tensor]
    turn_right: Callable[[Tensor], Tensor]


def core_of(update: LowRankUpdate | Tensor) -> Core:
    """The core s R_B R_A^T of an update, or dW itself where its rank is past half the smaller side:
    there the two QRs cost more than they save."""
    if isinstance(update, Tensor):
        return Core(update.double(), _as_it_is, _as_it_is)
    if 2 * update.rank > min(update.shape):
        product = (update.B.double() * update.scale) @ update.A.double()
        return Core(product, _as_it_is, _as_it_is)
    turn_left, r_b = _reflections(update.B.double())
    turn_right, r_a = _reflections(update.A.double().T)
    return Core(update.scale * r_b @ r_a.T, turn_left, turn_right)


def spectrum(update: LowRankUpdate | Tensor) -> Spectrum:
    """The singular values of an update, k = min(rank, out, in) of them, or of a dense matrix."""
    core = core_of(update)
    left, values, right = torch.linalg.svd(core.matrix, full_matrices=False)
    if isinstance(update, Tensor):
        k, dtype = min(update.shape), update.dtype
    else:
        k, dtype = min(update.rank, *update.shape), core.matrix.dtype

    def leading(count: int) -> tuple[Tensor, Tensor]:
        return core.turn_left(left[:, :count]), core.turn_right(right[:count].T).T

    return Spectrum(values[:k], _rank(values[:k], update.shape, dtype), leading)


def decompose(update: LowRankUpdate | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of dW, in float64.

    Returns:
        U (out, k), singular values (k,) in falling order, V^T (k, in), with
        k = min(rank, out, in).
    """
    found = spectrum(update)
    left, right = found.leading(len(found.values))
    return left, found.values, right


def leading_triplets(
    update: LowRankUpdate | Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values of an update with their vectors, in float64.

    They come from the largest eigenvalues of the core's Gram matrix, several times faster than a
    whole SVD. Squaring leaves singular values below 1e-8 of the largest one unresolved; such are
    left out. U diag(values) V^T is the core projected on one set of vectors, so errors in those
    count only squared.

    Args:
        update: factors, or a dense matrix.
        count: how many, at most the smaller side of the core.

    Returns:
        U (out, k), the values (k,) in falling order, V^T (k, in), k <= count, and the sum of the
        squares of all singular values.
    """
    core = core_of(update)
    wide = core.matrix.shape[0] <= core.matrix.shape[1]
    matrix = core.matrix if wide else core.matrix.T
    gram = matrix @ matrix.T
    energy = float(gram.trace())
    squares, vectors = _largest_eigenpairs(gram, count)
    floor = len(gram) * torch.finfo(torch.float64).eps * squares[0]
    there = max(1, int((squares > floor).sum()))
    values = squares[:there].clamp(min=0).sqrt()
    one = vectors[:, :there]
    other = (one.T @ matrix).T / torch.where(values > 0, values, 1)
    left, right = (one, other) if wide else (other, one)
    return core.turn_left(left), values, core.turn_right(right).T, energy


def _largest_eigenpairs(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (count,) in falling order and their vectors (side, count)."""
    side = len(symmetric)
    if side <= WHOLE_SIDE:
        all_values, all_vectors = torch.linalg.eigh(symmetric)
        return all_values.flip(0)[:count], all_vectors.flip(1)[:, :count]
    values, vectors = scipy.linalg.eigh(
        symmetric.numpy(),
        subset_by_index=[side - count, side - 1],
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def column_basis(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a matrix without the directions that are zero up to rounding.

    Args:
        matrix: (rows, columns), at least one of each.

    Returns:
        U (rows, k), an orthonormal basis of the columns, the singular values (k,) in falling
        order, and V^T (k, columns), in float64, with k the rank.
    """
    matrix = matrix.double()
    shape = (matrix.shape[0], matrix.shape[1])
    if 2 * shape[1] > shape[0]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = _rank(values, shape)
        return left[:, :rank], values[:rank], right[:rank]
    turn, triangle = _reflections(matrix)
    left, values, right = torch.linalg.svd(triangle)
    rank = _rank(values, shape)
    return turn(left[:, :rank]), values[:rank], right[:rank]


def _rank(values: Tensor, shape: Iterable[int], dtype: torch.dtype = torch.float64) -> int:
    """How many values, in falling order, stand out from rounding in that dtype."""
    if len(values) == 0:
        return 0
    # Four times what numpy's matrix_rank allows, since these are products, which round more often.
    floor = 4 * max(shape) * torch.finfo(dtype).eps * float(values[0])
    return int((values > floor).sum())


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _reflections(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The QR of a tall matrix: x (columns, n) -> Q x, and R (columns, columns)."""
    packed, scales = torch.geqrf(matrix)
    columns = matrix.shape[1]

    def turn(x: Tensor) -> Tensor:
        whole = x.new_zeros(packed.shape[0], x.shape[1])
        whole[:columns] = x
        return torch.ormqr(packed, scales, whole)

    return turn, packed[:columns].triu()
