"""What the index keeps of an adapter beside its document: its card, and facts of each module."""

import hashlib
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RANKS, NORMS, PROJECTIONS = "i", "d", "f"
"""Array types: int32, float64 and float32."""


@dataclass(frozen=True)
class ModuleFacts:
    """One module of an adapter.

    Args:
        rank: the inner dimension of its factors.
        norm: the Frobenius norm of its update.
        projection: its random projections, as `lora.fingerprint.project` makes them.
    """

    rank: int
    norm: float
    projection: Sequence[float]


@dataclass(frozen=True)
class Details:
    """What is known of an adapter beside its document.

    Args:
        card: the text of its model card; empty for none.
        modules: module path -> its facts; empty where nobody read the tensors. All projections
            have one length.
    """

    card: str = ""
    modules: Mapping[str, ModuleFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedModules:
    """The facts of all modules as the index keeps them, in the order of the paths.

    Args:
        digest: of the paths, in hex.
        paths: a JSON list, sorted.
        ranks: little-endian int32.
        norms: little-endian float64.
        projections: little-endian float32, those of the first module first.
    """

    digest: str
    paths: str
    ranks: bytes
    norms: bytes
    projections: bytes


@dataclass(frozen=True)
class StoredProjections:
    """The projections of one adapter as the index keeps them.

    Args:
        modules: the number of its set of modules.
        ranks: little-endian int32 in the order of the modules' paths.
        numbers: little-endian float32, those of the first module first.
    """

    modules: int
    ranks: bytes
    numbers: bytes

    def size(self, paths: Sequence[str]) -> int:
        """How many numbers there are for each of its modules, which these are the paths of."""
        return len(self.numbers) // (4 * len(paths))


def pack_modules(modules: Mapping[str, ModuleFacts]) -> PackedModules:
    """Module facts as bytes.

    Raises:
        ValueError: the projections have several lengths.
    """
    names = sorted(modules)
    if len({len(modules[name].projection) for name in names}) > 1:
        raise ValueError("the projections of the modules have several lengths")
    paths = json.dumps(names)
    return PackedModules(
        digest=hashlib.sha256(paths.encode()).hexdigest(),
        paths=paths,
        ranks=_pack(RANKS, [modules[name].rank for name in names]),
        norms=_pack(NORMS, [modules[name].norm for name in names]),
        projections=_pack(
            PROJECTIONS, [number for name in names for number in modules[name].projection]
        ),
    )


def unpack_modules(
    paths: str, ranks: bytes, norms: bytes, projections: bytes
) -> dict[str, ModuleFacts]:
    """What `pack_modules` packed, projections rounded to float32."""
    names = json.loads(paths)
    numbers = _unpack(PROJECTIONS, projections)
    size = len(numbers) // max(1, len(names))
    facts = zip(_unpack(RANKS, ranks), _unpack(NORMS, norms), strict=True)
    return {
        name: ModuleFacts(rank, norm, numbers[place * size : (place + 1) * size])
        for place, (name, (rank, norm)) in enumerate(zip(names, facts, strict=True))
    }


def _pack(kind: str, numbers: Sequence[float]) -> bytes:
    return _little_endian(array(kind, numbers)).tobytes()


def _unpack(kind: str, data: bytes) -> list[Any]:
    numbers: array[Any] = array(kind)
    numbers.frombytes(data)
    return _little_endian(numbers).tolist()


def _little_endian(numbers: "array[Any]") -> "array[Any]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
