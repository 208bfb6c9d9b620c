"""What `recycle merge` is asked to do, and whether that can be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import WEIGHT_USES, MergeMethod, find_merge_method
from recycle_cli.merging.parameters import PARAMETERS, cancel
from recycle_cli.parameters import Value
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.output_folder import check_save_dtype
from recycle_cli.workflows.provenance import shown

ADAPTER, WITH_RESIDUAL = "adapter", "adapter+residual"
FORMS = (ADAPTER, WITH_RESIDUAL)
ABSENT = ("zero", "skip")


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, how, and into what.

    Args:
        base_model: the canonical name of the base model.
        out: the folder to write.
        method: a name in the merging catalog.
        parameters: those of the method that are not at their defaults.
        weights: one for each adapter, or None for 1 each.
        absent: what an adapter counts for in a module that it lacks: `zero`, or `skip` for not
            at all.
        rank: `full`, `N` or `energy:E`.
        uniform: give every module the largest rank, with zeros.
        form: `adapter`, or `adapter+residual` for methods that can be had in two parts; `rank`
            is then that of the residual.
        into_base: a base model whose weights the merge is to be written into; None for an adapter.
        check: compare the logits of that model with those of the base and the update apart.
        save_dtype: of an adapter's factors on disk.
        seed: of what the method draws.
        force: replace `out` where it exists.
    """

    base_model: str
    out: Path
    method: str = "average"
    parameters: Mapping[str, Value] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    absent: str = "zero"
    rank: str = "full"
    uniform: bool = False
    form: str = ADAPTER
    into_base: str | None = None
    check: bool = False
    save_dtype: str = "float32"
    seed: int = 0
    force: bool = False

    def command(self, sources: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "merge", *(source.word for source in sources)]
        words += ["--base-model", self.base_model, "--method", self.method]
        for name, value in self.parameters.items():
            words += [PARAMETERS[name].option, str(value)]
        if self.weights is not None:
            words += ["--weights=" + ",".join(repr(weight) for weight in self.weights)]
        words += ["--absent", self.absent] * (self.absent != "zero")
        words += ["--rank", self.rank]
        words += ["--uniform"] * self.uniform
        words += ["--as", self.form] * (self.form != ADAPTER)
        words += ["--into-base", self.into_base] if self.into_base else []
        words += ["--check"] * self.check
        words += ["--save-dtype", self.save_dtype] * (self.save_dtype != "float32")
        words += ["--seed", str(self.seed)] * (self.seed != 0)
        return [*words, "--out", shown(self.out)]


def check_merge(request: MergeRequest, sources: Sequence[Source]) -> MergeMethod:
    """Checks a request before any work is done.

    Returns:
        The method.

    Raises:
        InputError: the method is unknown, it does not take these adapters, weights or
            parameters, or options contradict each other.
    """
    method = find_merge_method(request.method)
    method.settings(request.parameters)
    if method.most_adapters is not None and len(sources) > method.most_adapters:
        raise InputError(
            f"--method {method.name} takes at most {method.most_adapters} adapters, "
            f"not {len(sources)}",
            "leave some out, or use --method karcher or average",
        )
    _check_weights(request.weights, len(sources), method)
    _check_absent(request.absent, method)
    _check_form(request, method)
    check_save_dtype(request.save_dtype)
    return method


def _check_weights(weights: Sequence[float] | None, adapters: int, method: MergeMethod) -> None:
    if weights is None:
        return
    if len(weights) != adapters:
        raise InputError(
            f"--weights has {len(weights)} numbers for {adapters} adapters",
            "give one number for each adapter, in their order",
        )
    if method.weights == "none":
        raise InputError(f"--weights has no effect with --method {method.name}", "leave it out")
    if method.weights == "convex" and min(weights) < 0:
        raise InputError(
            f"--weights holds {min(weights):g}; with --method {method.name}, weights "
            f"{WEIGHT_USES[method.weights]}",
            "use weights from 0",
        )
    if method.weights in ("shares", "convex") and cancel(weights):
        raise InputError(
            f"--weights sums to 0, which --method {method.name} divides by",
            "use other weights, or --method linear",
        )


def _check_absent(absent: str, method: MergeMethod) -> None:
    if absent not in ABSENT:
        raise InputError(f"--absent is {absent!r}", f"use one of {', '.join(ABSENT)}")
    if absent != "zero" and not method.absent_counts:
        raise InputError(
            f"--absent {absent} has no effect with --method {method.name}, where an adapter "
            "without a module adds nothing there",
            "leave it out",
        )


def _check_form(request: MergeRequest, method: MergeMethod) -> None:
    if request.form not in FORMS:
        raise InputError(f"--as is {request.form!r}", f"use one of {', '.join(FORMS)}")
    if request.form == WITH_RESIDUAL and method.split is None:
        raise InputError(
            f"--as {request.form} has no meaning with --method {method.name}, which leaves "
            "nothing over",
            "use --method fedex",
        )
    if request.check and request.into_base is None:
        raise InputError("--check has no effect without --into-base", "leave it out")
    unused = {
        "--as": request.form != ADAPTER,
        "--uniform": request.uniform,
        "--save-dtype": request.save_dtype != "float32",
    }
    for option, given in unused.items():
        if given and request.into_base is not None:
            raise InputError(
                f"{option} is about an adapter, and --into-base writes a model", "leave one out"
            )
