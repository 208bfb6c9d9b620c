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

from recycle_cli.lora.update import BLOCK_ENTRIES, LowRankUpdate


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


def spectrum(update: LowRankUpdate | Tensor) -> Spectrum:
    """The singular values of an update, k = min(rank, out, in) of them, or of a dense matrix."""
    if isinstance(update, Tensor):
        return _dense_spectrum(update.double(), min(update.shape), update.dtype)
    if 2 * update.rank > min(update.shape):
        # Past half the smaller side the two QRs cost more than one SVD of the product itself.
        product = (update.B.double() * update.scale) @ update.A.double()
        return _dense_spectrum(product, min(update.rank, *update.shape), product.dtype)
    left_turn, r_b = _reflections(update.B.double())
    right_turn, r_a = _reflections(update.A.double().T)
    left, values, right = torch.linalg.svd(update.scale * r_b @ r_a.T)

    def leading(count: int) -> tuple[Tensor, Tensor]:
        return left_turn(left[:, :count]), right_turn(right[:count].T).T

    return Spectrum(values, _rank(values, update.shape), leading)


def decompose(update: LowRankUpdate | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of dW, in float64.

    Returns:
        U (out, k), singular values (k,) in falling order, V^T (k, in), with
        k = min(rank, out, in).
    """
    found = spectrum(update)
    left, right = found.leading(len(found.values))
    return left, found.values, right


def leading_triplets(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a dense matrix, with their vectors, in float64.

    They come from the largest eigenvalues of the Gram matrix of the smaller side, several times
    faster than the whole SVD. Squaring leaves singular values below 1e-8 of the largest one
    unresolved; such are left out. U diag(values) V^T is the matrix projected on one set of
    vectors, so errors in those count only squared.

    Args:
        matrix: (rows, columns).
        count: how many, at most the smaller side.

    Returns:
        U (rows, k), the values (k,) in falling order, and V^T (k, columns); k <= count.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, values, right = leading_triplets(matrix.T, count)
        return right.T, values, left.T
    parts = [part.double() for part in matrix.split(max(1, BLOCK_ENTRIES // rows), dim=1)]
    gram = sum((part @ part.T for part in parts), start=torch.zeros(rows, rows).double())
    squares, vectors = scipy.linalg.eigh(
        gram.numpy(),
        subset_by_index=[rows - count, rows - 1],
        driver="evr",
        overwrite_a=True,
        check_finite=False,
    )
    squares = torch.from_numpy(squares).flip(0)
    there = max(1, int((squares > rows * torch.finfo(torch.float64).eps * squares[0]).sum()))
    left = torch.from_numpy(vectors).flip(1)[:, :there]
    values = squares[:there].clamp(min=0).sqrt()
    right = torch.cat([left.T @ part for part in parts], dim=1)
    return left, values, right / torch.where(values > 0, values, 1)[:, None]


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


def _dense_spectrum(matrix: Tensor, k: int, dtype: torch.dtype) -> Spectrum:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = _rank(values[:k], matrix.shape, dtype)
    return Spectrum(values[:k], rank, lambda count: (left[:, :count], right[:count]))


def _reflections(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The QR of a tall matrix: x (columns, n) -> Q x, and R (columns, columns)."""
    packed, scales = torch.geqrf(matrix)
    columns = matrix.shape[1]

    def turn(x: Tensor) -> Tensor:
        whole = x.new_zeros(packed.shape[0], x.shape[1])
        whole[:columns] = x
        return torch.ormqr(packed, scales, whole)

    return turn, packed[:columns].triu()
