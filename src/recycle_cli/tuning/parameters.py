"""The parameters that tuning methods take."""

from collections.abc import Mapping

from recycle_cli.lora.config import MAX_RANK
from recycle_cli.parameters import Parameter
from recycle_cli.tuning.choices import (
    ACTIVATIONS,
    AFFINE,
    GRANULARITIES,
    INITS,
    LEVELS,
    OPTIMIZERS,
    PROXIES,
    RESTORES,
    SCORES,
)
from recycle_cli.tuning.lora_catalog import OPTIONS, names_on


def _axis(name: str, what: str) -> Parameter:
    """The parameter that chooses on an axis of a LoRA to train."""
    summaries = "; ".join(f"{n}: {OPTIONS[n].summary}" for n in names_on(name))
    return Parameter(name, str, f"Of a LoRA to train, {what}. {summaries}.", choices=names_on(name))


_OPTIMIZERS = tuple(dict.fromkeys((*OPTIMIZERS, *names_on("optimizer"))))

PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "granularity",
            str,
            "What shares a coefficient of an adapter: all its modules (adapter), those of a layer, "
            "of a sublayer (attention, MLP), none (module); dimension: a coefficient for each "
            "rank-1 component.",
            choices=GRANULARITIES,
        ),
        Parameter(
            "activation",
            str,
            "What a coefficient goes through; softmax is over the adapters.",
            choices=ACTIVATIONS,
        ),
        Parameter(
            "init",
            str,
            "Where coefficients start. equal: 1 / sqrt(adapters); normal: N(0, 0.5^2); uniform: "
            "U(0, 1); one-hot: 1 for the target LoRA, 0 for the rest.",
            choices=INITS,
        ),
        Parameter(
            "affine",
            bool,
            f"With {' or '.join(AFFINE)}: learn a scale and an offset for each group too.",
        ),
        Parameter("l1", float, "Weight of the mean |coefficient| in the loss."),
        Parameter(
            "optimizer",
            str,
            "Of a mixture: adamw follows gradients; ngopt (nevergrad) searches without, one "
            "evaluation of the training rows a step. Of a LoRA to train: "
            + "; ".join(f"{name}: {OPTIONS[name].summary}" for name in names_on("optimizer"))
            + ".",
            choices=_OPTIMIZERS,
        ),
        _axis("architecture", "the form of its update"),
        _axis("schedule", "what of it is trained when"),
        _axis("allocation", "which modules get which rank"),
        Parameter(
            "update_skipping",
            float,
            "Where the root mean square of a factor's gradient, in coordinates of the product, is "
            "above this, the factor goes on by its momentum alone in that step; 0 never skips.",
        ),
        Parameter(
            "inner_steps",
            int,
            "How often the two factors are solved for in turn in a step; 0 is a preconditioned "
            "gradient step.",
            high=1000,
        ),
        Parameter(
            "proximal",
            float,
            "How strongly factors are held where they are in a step, times the rate.",
        ),
        Parameter("momentum", float, "Of the gradient, kept as a LoRA of its own.", high=0.999),
        Parameter(
            "metric_decay", float, "Of the running means of K-FAC's diagonals.", high=0.99999
        ),
        Parameter(
            "metric_power",
            float,
            "Of K-FAC's diagonals: 1 is plain diagonal K-FAC, 0 none.",
            high=1.0,
        ),
        Parameter("metric_damping", float, "Added to K-FAC's diagonals.", low_is_out=True),
        Parameter("damping", float, "Added to the diagonal of the Gram matrices.", low_is_out=True),
        Parameter("lr_ratio", float, "The rate of B in that of A.", low=1.0),
        Parameter(
            "previous",
            int,
            "How many modules of its kind, in the layers before, a module reaches back to; 0 is an "
            "ordinary LoRA.",
        ),
        Parameter("blocks", int, "LoRAs in the chain, each of the rank asked for.", low=1),
        Parameter(
            "proxy",
            str,
            "What modules are scored by: the norm of the factors' gradients, their sizes times "
            "gradients, those of a model of sizes (synflow), or chance (constant).",
            choices=PROXIES,
        ),
        Parameter(
            "share",
            float,
            "Of the modules that get a LoRA, of 1 / share times the rank.",
            high=1.0,
            low_is_out=True,
        ),
        Parameter(
            "proxy_steps",
            int,
            "Steps of training before modules are scored, of which nothing is kept.",
        ),
        Parameter(
            "reallocate_every",
            int,
            "Score again after so many steps, and switch LoRAs on and off; 0 scores once.",
        ),
        Parameter(
            "bound",
            float,
            "ngopt looks for coefficients in [-bound, bound]; the start is clipped to that.",
            low_is_out=True,
        ),
        Parameter(
            "new_rank",
            int,
            "The rank of the new LoRA that is trained beside.",
            low=1,
            high=MAX_RANK,
        ),
        Parameter(
            "reduce_rank",
            bool,
            "The new direction's rank falls with the number of adapters: 10, from 4 on 8, from 8 "
            "on 6.",
        ),
        Parameter(
            "distill",
            float,
            "After training, absorb the new direction into the magnitudes of the others where the "
            "squared share of it that they cannot express is at most this; 0 never does.",
            high=1.0,
        ),
        Parameter("top_k", int, "How many adapters a token is routed to; 0 for all.", low=0),
        Parameter("temperature", float, "Of the router's softmax.", low_is_out=True),
        Parameter(
            "prune", float, "The share of the entries that is pruned after every step.", high=1.0
        ),
        Parameter(
            "score",
            str,
            "What an entry counts by: its effect on the update, weighted by the size of the inputs "
            "(input), or the size and spread of parameter times gradient (grad).",
            choices=SCORES,
        ),
        Parameter(
            "level",
            str,
            "What is pruned: the lowest entries of each tensor, or whole modules by their mean.",
            choices=LEVELS,
        ),
        Parameter(
            "restore",
            str,
            "What pruned entries become: zero, or what the adapter came with (init).",
            choices=RESTORES,
        ),
    )
}
