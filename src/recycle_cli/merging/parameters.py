"""The parameters that merge rules take."""

from collections.abc import Mapping, Sequence

from recycle_cli.parameters import Parameter

ROUNDING = 1e-12


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of weights is 0 up to rounding, so that nothing can be divided by it."""
    return abs(sum(weights)) <= ROUNDING * sum(map(abs, weights))


PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "density",
            float,
            "The share of the entries of each update that is kept.",
            high=1.0,
            low_is_out=True,
        ),
        Parameter(
            "normalize",
            str,
            "Divide by the number of updates that agree on a sign, or by the sum of their weights.",
            choices=("count", "weights"),
        ),
        Parameter("gamma", float, "The share of the largest entries that is left out.", high=1.0),
        Parameter(
            "epsilon",
            float,
            "Entries are kept with a probability from density - epsilon to density + epsilon.",
            high=1.0,
        ),
        Parameter("components", int, "The most singular triplets that one adapter gives.", low=1.0),
        Parameter(
            "inner",
            str,
            "The rule that merges the cores.",
            choices=("linear", "ties", "dare"),
        ),
        Parameter("shared_rank", int, "The rank of the shared subspaces.", low=1.0),
        Parameter("clusters", int, "The number of clusters, which is the rank.", low=1.0),
    )
}
