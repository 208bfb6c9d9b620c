"""The merge rules there are. A new one is a function beside this file and a row here."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.merging.parameters import PARAMETERS
from recycle_cli.parameters import Parameter, Value

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.lora.update import LowRankUpdate
    from recycle_cli.merging.group import MergeRule

WeightUse = Literal["factors", "shares", "convex", "none"]
WEIGHT_USES: Mapping[WeightUse, str] = {
    "factors": "multiply the updates as they are",
    "shares": "count by their shares in the sum, which must not be 0",
    "convex": "count by their shares in the sum; none below 0",
    "none": "are not used",
}


@dataclass(frozen=True)
class MergeMethod:
    """A merge rule: what it is called, what it does, where it is from, and where it lives.

    Args:
        name: what `--method` takes.
        summary: what it gives, for the help and for cards.
        detail: what else to know, a sentence.
        formula: of one module.
        paper: its source.
        target: `module:function` under `recycle_cli.merging`; the function takes a Group and the
            method's parameters, and gives factors or a dense matrix.
        defaults: its parameters and their defaults; None lets the rule choose.
        weights: how it uses the adapters' weights.
        invariant: whether only the updates count, not how they are split into factors: the
            result is the same for (B G, G^-1 A).
        lossless: the parameters under which a single adapter at weight 1 comes back as it is;
            None if there are none such.
        absent_counts: whether it matters that an adapter lacks a module, as in a mean.
        most_adapters: how many it takes at most; None for any number.
        split: for a rule whose result can be had in two parts, the targets of the parts: the
            adapter, and what is to be added to the base model for an exact result.
    """

    name: str
    summary: str
    detail: str
    formula: str
    paper: str
    target: str
    defaults: Mapping[str, Value] = field(default_factory=dict)
    weights: WeightUse = "factors"
    invariant: bool = True
    lossless: Mapping[str, Value] | None = field(default_factory=dict)
    absent_counts: bool = False
    most_adapters: int | None = None
    split: tuple[str, str] | None = None

    def load(self, settings: Mapping[str, Value]) -> "MergeRule":
        """The rule with these parameters, as `settings` gives them."""
        return functools.partial(load_rule(self.target), **settings)

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters it takes."""
        return [PARAMETERS[name] for name in self.defaults]

    def settings(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Its parameters with their values in force.

        Args:
            given: values by parameter name; None means that the user gave none.

        Raises:
            InputError: a value is out of range, or its parameter has no effect on this rule.
        """
        wanted = {name: value for name, value in given.items() if value is not None}
        for name, value in wanted.items():
            if name not in self.defaults:
                raise _no_effect(PARAMETERS[name], f"with --method {self.name}")
            PARAMETERS[name].check(value)
        settings = {**self.defaults, **wanted}
        _check_together(settings, wanted)
        return settings


def load_rule(target: str) -> "Callable[..., LowRankUpdate | Tensor]":
    """The function behind `module:function`, under `recycle_cli.merging`."""
    module, _, function = target.partition(":")
    rule: Callable[..., LowRankUpdate | Tensor] = getattr(
        importlib.import_module(f"recycle_cli.merging.{module}"), function
    )
    return rule


def _check_together(settings: Mapping[str, Value], given: Mapping[str, Value]) -> None:
    if settings.get("inner") == "linear" and "density" in given:
        raise _no_effect(PARAMETERS["density"], "with --inner linear")
    density, epsilon = settings.get("density"), settings.get("epsilon")
    if isinstance(density, int | float) and isinstance(epsilon, int | float) and density < 1:
        lowest, highest = density - epsilon, density + epsilon
        if lowest <= 0 or highest > 1:
            raise InputError(
                f"--density {density:g} and --epsilon {epsilon:g} ask for probabilities from "
                f"{lowest:g} to {highest:g}",
                "choose them so that these lie in (0, 1]",
            )


def _no_effect(parameter: Parameter, where: str) -> InputError:
    takers = ", ".join(
        method.name for method in METHODS.values() if parameter.name in method.defaults
    )
    return InputError(
        f"{parameter.option} has no effect {where}", f"leave it out, or use one of: {takers}"
    )


_ROWS = (
    MergeMethod(
        "average",
        "the weighted mean of the updates",
        "Exact: the factors are put side by side, so the rank is the sum of the ranks.",
        "sum_i w_i dW_i / sum_i w_i",
        "arXiv 2203.05482",
        "linear:average",
        weights="shares",
        absent_counts=True,
    ),
    MergeMethod(
        "linear",
        "the weighted sum of the updates",
        "Task arithmetic, exact as average is; PEFT's `linear` has cross terms, its `cat` has not.",
        "sum_i w_i dW_i",
        "arXiv 2212.04089",
        "linear:linear",
    ),
    MergeMethod(
        "ties",
        "trim, elect a sign for each entry, and take the mean of those that agree",
        "Trims by magnitude within each matrix and elects by the weighted sum.",
        "m = sign(sum_i w_i trim(dW_i)); mean of the w_i trim(dW_i) whose sign is m",
        "arXiv 2306.01708",
        "elementwise:ties",
        {"density": 0.2, "normalize": "count"},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "dare-linear",
        "drop entries at random, rescale, and sum",
        "Entries are kept with probability `density` and divided by it, so the expectation stays.",
        "sum_i w_i mask_i dW_i / density",
        "arXiv 2311.03099",
        "elementwise:dare_linear",
        {"density": 0.5},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "dare-ties",
        "drop entries at random, rescale, and elect signs as ties does",
        "The draws of an adapter depend on the seed, its sha256 and the module alone.",
        "as ties, of mask_i dW_i / density",
        "arXiv 2311.03099",
        "elementwise:dare_ties",
        {"density": 0.5, "normalize": "count"},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "della",
        "drop the smaller entries of each row the likelier, rescale, and elect signs",
        "Each entry kept is divided by its own probability, as in the paper; mergekit, whose range "
        "of probabilities this is, rescales by the l1 norm instead.",
        "as ties, of mask_i dW_i / p_i, p_i from density - epsilon to density + epsilon by rank",
        "arXiv 2406.11617",
        "elementwise:della",
        {"density": 0.5, "epsilon": 0.1, "normalize": "count"},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "breadcrumbs",
        "leave out the largest and the smallest entries of each update, and sum",
        "The largest are taken for outliers, the smallest for noise.",
        "sum_i w_i band(dW_i)",
        "arXiv 2312.06795",
        "elementwise:breadcrumbs",
        {"density": 0.1, "gamma": 0.01},
        lossless={"density": 1.0, "gamma": 0.0},
    ),
    MergeMethod(
        "magnitude-prune",
        "keep the largest entries of each update, and sum",
        "Trimmed as ties trims, without the election.",
        "sum_i w_i trim(dW_i)",
        "arXiv 2306.01708",
        "elementwise:magnitude_prune",
        {"density": 0.2},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "sce",
        "keep the entries that vary most, weigh updates by their energy there, erase minor signs",
        "An update's weight in each module is its share of the squared norm on the chosen entries.",
        "sum_i e_i a_i dW_i / sum_i e_i a_i, a_i where dW_i has the sign of the sum",
        "arXiv 2408.07990",
        "sce:sce",
        {"density": 0.1},
        weights="none",
        absent_counts=True,
    ),
    MergeMethod(
        "tsv",
        "the largest singular triplets of each update, their vectors made orthogonal",
        "No adapter gives more triplets than its rank or its share of the smaller side, since "
        "beyond its rank singular vectors are arbitrary.",
        "U diag(w_i S_i) V^T, U and V the polar factors of [U_1 .. U_K] and [V_1 .. V_K]",
        "arXiv 2412.00081",
        "spectral:tsv",
        {"components": None},
        absent_counts=True,
    ),
    MergeMethod(
        "iso",
        "the weighted sum with all its singular values made equal",
        "Iso-C; the mean is over the singular values that are not zero.",
        "mean(S) U V^T, where U S V^T = sum_i w_i dW_i",
        "arXiv 2502.04959",
        "spectral:iso",
        lossless=None,
    ),
    MergeMethod(
        "knots-ties",
        "ties in the common left singular basis of all updates",
        "Computed from factors, without the dense matrices that the paper's code takes apart.",
        "U ties(S V_1^T, .., S V_K^T), where [dW_1 .. dW_K] = U S [V_1^T .. V_K^T]",
        "arXiv 2410.19735",
        "aligned:knots_ties",
        {"density": 0.2, "normalize": "count"},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "knots-dare",
        "dare-ties in the common left singular basis of all updates",
        "The paper's KnOTS-DARE-TIES.",
        "U dare-ties(S V_1^T, .., S V_K^T), where [dW_1 .. dW_K] = U S [V_1^T .. V_K^T]",
        "arXiv 2410.19735",
        "aligned:knots_dare",
        {"density": 0.5, "normalize": "count"},
        lossless={"density": 1.0},
    ),
    MergeMethod(
        "core-space",
        "an inner rule on small cores that hold the updates without loss",
        "With linear inside it is the weighted sum; with ties or dare it depends on how the "
        "updates are split into factors.",
        "U rule(U^T dW_1 V, ..) V^T, U a basis of the columns of all B_i, V of the rows of all A_i",
        "arXiv 2509.17786",
        "aligned:core_space",
        {"inner": "ties", "density": 0.2},
        invariant=False,
        lossless={"inner": "linear"},
    ),
    MergeMethod(
        "compress-then-merge",
        "an inner rule on cores in shared subspaces of the final rank",
        "Each update is projected first, so the result has the rank asked for by construction.",
        "U rule(U^T dW_1 V, ..) V^T, U and V the largest singular vectors of the updates together",
        "arXiv 2606.03723",
        "aligned:compress_then_merge",
        {"shared_rank": None, "inner": "linear", "density": 0.2},
    ),
    MergeMethod(
        "lora-lego",
        "the centroids of clusters of the adapters' rank-1 units",
        "Centroids are stretched to the mean norm of their units, and the whole by sqrt(rank / "
        "clusters).",
        "sum_c b_c a_c, (b_c, a_c) the rescaled centroids of the units (b_ij, a_ij)",
        "arXiv 2409.16167",
        "lora_lego:lora_lego",
        {"clusters": None},
        weights="none",
        invariant=False,
    ),
    MergeMethod(
        "slerp",
        "spherical interpolation between two updates",
        "Within each module, from the first adapter to the second by the second's share of the "
        "weights; a weighted sum, so exact.",
        "sin((1 - t) a) / sin(a) dW_1 + sin(t a) / sin(a) dW_2, a their angle",
        "Shoemake 1985",
        "sphere:slerp",
        weights="convex",
        absent_counts=True,
        most_adapters=2,
    ),
    MergeMethod(
        "karcher",
        "the mean direction on the sphere with the mean length",
        "A weighted sum whose weights come from the inner products of the updates, so exact.",
        "(sum_i w_i |dW_i|) mean direction of dW_i / |dW_i|",
        "arXiv 2603.04972",
        "sphere:karcher",
        weights="convex",
        absent_counts=True,
    ),
    MergeMethod(
        "fedex",
        "the exact weighted mean, as the average of the factors plus what that lacks",
        "As one adapter it equals average; `--as adapter+residual` keeps an adapter of the "
        "sources' own rank and writes the rest beside it, for the base model.",
        "B A + sum_i w_i (B_i - B)(A_i - A), B and A the weighted means, sum_i w_i = 1",
        "arXiv 2410.09432",
        "linear:average",
        weights="shares",
        absent_counts=True,
        split=("federated:factor_average", "federated:residual"),
    ),
    MergeMethod(
        "factor-average",
        "the average of the factors, which is not that of the updates",
        "FedIT, for comparison: it has cross terms, and takes adapters of equal rank only.",
        "(sum_i w_i B_i)(sum_i w_i A_i), sum_i w_i = 1",
        "arXiv 2305.05644",
        "federated:factor_average",
        weights="shares",
        invariant=False,
        absent_counts=True,
    ),
)

METHODS: Mapping[str, MergeMethod] = {method.name: method for method in _ROWS}


def find_merge_method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("merge method", name, METHODS)
    return METHODS[name]
