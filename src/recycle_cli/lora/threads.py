"""How many threads the algebra of one module runs on."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from threadpoolctl import ThreadpoolController

LARGE = 1 << 22
"""From this many entries on, a matrix is worth several threads."""


@contextlib.contextmanager
def threads_for(shape: tuple[int, int]) -> Iterator[None]:
    """One thread for the work on a module whose weight is small, else as many as there are.

    Small decompositions gain nothing from a second thread, and may lose thirty times their time
    to the waiting for it where other processes want the same cores.

    Args:
        shape: (out, in) of the module.
    """
    if shape[0] * shape[1] >= LARGE:
        yield
        return
    # scipy brings a pool of its own.
    with torch_threads(1), _pools().limit(limits=1, user_api="blas"):
        yield


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _pools() -> ThreadpoolController:
    # The pools of the libraries that are loaded by now: it has to come after scipy.
    import scipy.linalg  # noqa: F401

    return ThreadpoolController()
