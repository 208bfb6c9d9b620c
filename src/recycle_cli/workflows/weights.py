"""The weights of a merge: as the user wrote them, or as documents from a pipe carry them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import WEIGHT_USES, find_merge_method
from recycle_cli.merging.parameters import cancel
from recycle_cli.records import Document, MergeDocument, SelectionDocument, TuneDocument
from recycle_cli.store.text import expanded
from recycle_cli.tuning.catalog import COEFFICIENT, find_tuning_method
from recycle_cli.workflows.adapters import Source, counted

FROM = "from:"
SHA256 = "sha256:"
SCORE = "score"
MEMBERS = ("weight", "coefficient")
"""Fields of adapters that went into a result, rather than of the result."""


@dataclass(frozen=True)
class Weights:
    """What `--weights` says: one of the three.

    Args:
        positions: one number for each adapter, in their order.
        names: a number for each adapter by its name.
        field: where the numbers stand in the piped documents.
    """

    positions: tuple[float, ...] = ()
    names: Mapping[str, float] | None = None
    field: str | None = None

    @property
    def of_members(self) -> bool:
        """Whether they are for the adapters inside of piped results."""
        return self.field in MEMBERS

    def resolve(self, sources: Sequence[Source], documents: Sequence[Document]) -> list[float]:
        """One weight for each source.

        Raises:
            InputError: they do not fit the sources.
        """
        if self.field is not None:
            return _from_documents(self.field, sources, documents)
        if self.names is not None:
            return _by_name(self.names, sources)
        if len(self.positions) != len(sources):
            raise InputError(
                f"--weights has {len(self.positions)} numbers for {counted(sources)}",
                "give one number for each adapter, in their order, or ID=NUMBER for each",
            )
        return list(self.positions)


def parse_weights(text: str) -> Weights:
    """Reads `W,W,...`, `ID=W,ID=W,...` or `from:FIELD`.

    Raises:
        InputError: it is none of these.
    """
    if text.startswith(FROM):
        field = text.removeprefix(FROM)
        if field not in (SCORE, *MEMBERS):
            raise InputError(
                f"--weights is {text!r}",
                "use from:score (a selection), from:weight (a merge) or from:coefficient (a "
                "mixture)",
            )
        return Weights(field=field)
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return Weights(positions=tuple(_number(part, text) for part in parts))
    names: dict[str, float] = {}
    for part in parts:
        name, equals, number = part.rpartition("=")
        if not equals or not name or name in names:
            raise InputError(
                f"--weights is {text!r}", "name each adapter once, as in --weights one=1,other=0.5"
            )
        names[name] = _number(number, text)
    return Weights(names=names)


def scaled(weights: Sequence[float], total: float | None, method: str) -> list[float]:
    """The weights, multiplied so that their sum is `total`, where one is given.

    Raises:
        InputError: their sum is 0, or only their shares in it count in this merge method.
    """
    if total is None:
        return list(weights)
    if find_merge_method(method).weights != "factors":
        raise InputError(
            f"--weights-sum has no effect with --method {method}, where weights "
            f"{WEIGHT_USES[find_merge_method(method).weights]}",
            "leave it out",
        )
    if not math.isfinite(total):
        raise InputError(f"--weights-sum is {total}", "give a number")
    if cancel(weights):
        raise InputError(
            f"the weights sum to 0, so no factor brings them to --weights-sum {total:g}",
            "leave --weights-sum out, or use other weights",
        )
    return [weight * total / sum(weights) for weight in weights]


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"--weights is {whole!r}", "write numbers with commas between, as in --weights 1,0.5"
        )
    return number


def _by_name(names: Mapping[str, float], sources: Sequence[Source]) -> list[float]:
    weights: dict[str, float] = {}
    for name, weight in names.items():
        found = [source for source in sources if _is_called(source, name)]
        if len(found) != 1 or found[0].ref.sha256 in weights:
            trouble = "two of the adapters" if found else "none of the adapters"
            raise InputError(
                f"--weights names {name!r}, which is {trouble}",
                "name each once, by path, sha256:PREFIX or id: "
                + ", ".join(source.ref.id for source in sources),
            )
        weights[found[0].ref.sha256] = weight
    missing = [source.ref.id for source in sources if source.ref.sha256 not in weights]
    if missing:
        raise InputError(
            f"--weights has no number for {', '.join(missing)}",
            "name every adapter, if only with 0",
        )
    return [weights[source.ref.sha256] for source in sources]


def _is_called(source: Source, name: str) -> bool:
    ref = source.ref
    if name.startswith(SHA256) and name != SHA256:
        return ref.sha256.startswith(name.removeprefix(SHA256))
    return name == ref.id or expanded(name).absolute() == Path(ref.path)


def _from_documents(
    field: str, sources: Sequence[Source], documents: Sequence[Document]
) -> list[float]:
    found = {sha256: value for document in documents for sha256, value in _values(field, document)}
    missing = [source.ref.id for source in sources if source.ref.sha256 not in found]
    if missing:
        raise InputError(
            f"the input has no {field} for {', '.join(missing)}",
            "pipe in a selection for from:score, a merge for from:weight, a mixture of tune for "
            "from:coefficient",
        )
    return [found[source.ref.sha256] for source in sources]


def _values(field: str, document: Document) -> list[tuple[str, float]]:
    if field == SCORE and isinstance(document, SelectionDocument):
        return [(a.sha256, a.score) for a in document.adapters if a.score is not None]
    if field == "weight" and isinstance(document, MergeDocument):
        return [(adapter.sha256, adapter.weight) for adapter in document.adapters]
    if field == "coefficient" and isinstance(document, TuneDocument):
        method = find_tuning_method(document.method)
        if method.figure != COEFFICIENT:
            raise InputError(
                f"a result of --method {method.name} has no coefficients: what it tells of an "
                f"adapter is the {method.figure}",
                "use another --weights, or tune with another method",
            )
        return [(adapter.sha256, adapter.coefficient_mean) for adapter in document.adapters]
    return []
