"""A pool of strangers' adapters, with everything that strangers do, and what must come of each."""

from support.strangers.draft import base_shapes
from support.strangers.pool import BASE_MODEL, HUB_CODES, Pool, Stranger, make_pool

__all__ = ["BASE_MODEL", "HUB_CODES", "Pool", "Stranger", "base_shapes", "make_pool"]
