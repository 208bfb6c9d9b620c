"""Documents of `merge`, and of the methods of `merge` and `tune`."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from recycle_cli.records.document import AdapterRef, Document, Part, Run


class WeightedAdapter(AdapterRef):
    """A source of a merge, with its weight and licence."""

    weight: float
    license: str | None = None


class MergeDocument(Document, Run):
    """A merged adapter, or a model with the merge in its weights.

    `form` is `adapter`, `adapter+residual` (the rest of an exact merge lies in the folder
    `residual`, an adapter too) or `model`; `files` are all that was written, below `path`. `rank`
    is the largest among its modules. `energy_kept` is the share of the exact merge's squared
    Frobenius norm that was kept, in [0, 1], and `energy_by_module` that of every module that was
    cut; where there is a residual, both are about it. `sha256` is that of the weights file; of a
    model, that of the digests of its weights files in the order of their names.
    `max_logit_deviation` compares a model with the base and the unmerged update, where that was
    asked for. `licenses` are those of all sources, each once.
    """

    kind: ClassVar[str] = "merge"

    method: str
    params: dict[str, Any]
    base_model: str
    adapters: list[WeightedAdapter]
    form: Literal["adapter", "adapter+residual", "model"] = "adapter"
    rank: int
    energy_kept: float
    energy_by_module: dict[str, float] = Field(default_factory=dict)
    max_logit_deviation: float | None = None
    path: str
    files: list[str] = Field(default_factory=list)
    sha256: str
    licenses: list[str] = Field(default_factory=list)
    warnings: list[str]


class MethodParameter(Part):
    """A parameter of a method: its option, the values allowed, and its default, null where the
    method chooses."""

    name: str
    option: str
    help: str
    range: str
    default: float | int | str | None


class MethodDocument(Document):
    """A method that a command offers.

    `invariant` says that only the adapters' updates count, not how they are split into factors.
    `lossless` holds the parameters under which one adapter at weight 1 comes back as it is, and is
    null where there are none. `weights` says how the adapters' weights are used.
    """

    kind: ClassVar[str] = "method"

    command: str
    name: str
    summary: str
    detail: str
    formula: str
    paper: str
    parameters: list[MethodParameter]
    weights: str
    invariant: bool
    lossless: dict[str, float | int | str | None] | None
    most_adapters: int | None
