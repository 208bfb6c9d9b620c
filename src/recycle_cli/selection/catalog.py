"""The selection methods there are. A new one is a file beside this one and a row here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from recycle_cli.errors import unknown_name

Needs = Literal["nothing", "index", "target", "gradient", "rows"]


@dataclass(frozen=True)
class SelectionMethod:
    """A way to score adapters. Higher scores are better.

    Args:
        name: what `--method` takes.
        summary: one line for the help.
        detail: what else to know.
        formula: the score.
        paper: its source; empty for our own.
        needs: `nothing` but the adapters, what the `index` holds of them, a `target` LoRA to
            compare them with, one `gradient` of the base model on the task's rows, or the model
            run with each adapter on the `rows`.
        aggregates: whether --aggregate says how modules are put together.
    """

    name: str
    summary: str
    detail: str
    formula: str
    paper: str
    needs: Needs
    aggregates: bool = False

    @property
    def needs_task(self) -> bool:
        """Whether it has to know the task."""
        return self.needs in ("rows", "gradient") or self.name == CARD

    @property
    def needs_model(self) -> bool:
        """Whether it runs the base model."""
        return self.needs in ("rows", "gradient")


PAPER = "arXiv 2602.12323"
EVALUATION, HALVING, CARD, POPULARITY = "evaluation", "halving", "card", "popularity"
RANK, RANDOM, L2, GRADIENT, NORMALISED = "rank", "random", "l2", "gradient", "gradient-normalised"
_ROWS = (
    SelectionMethod(
        RANDOM,
        "a seeded shuffle: what the others are compared with",
        "A score depends on the seed and the adapter's sha256 alone, so it is the same on every "
        "machine and whatever else is in the pool.",
        "uniform in [0, 1)",
        PAPER,
        "nothing",
    ),
    SelectionMethod(
        RANK,
        "the largest rank first",
        "The largest inner dimension among an adapter's modules.",
        "max_m r_m",
        PAPER,
        "nothing",
    ),
    SelectionMethod(
        POPULARITY,
        "the most downloaded first",
        "As the Hub counted when the adapter was crawled; one from a folder has no count and is "
        "left out.",
        "downloads",
        "",
        "index",
    ),
    SelectionMethod(
        EVALUATION,
        "the adapter's own metric on the task's training rows; ties by mean log-likelihood",
        "One pass of the model over the rows for each adapter. Answers are kept in the index and "
        "never computed twice.",
        "share of rows answered right",
        PAPER,
        "rows",
    ),
    SelectionMethod(
        HALVING,
        "as evaluation, in rounds: the better half goes on to twice as many rows",
        "Successive halving. Those that went out early are not in the order; it may lose an "
        "adapter that the full ranking would have kept.",
        "share of rows answered right",
        "arXiv 1502.07943",
        "rows",
    ),
    SelectionMethod(
        GRADIENT,
        "what each adapter would do to the loss, to first order: one pass for the whole pool",
        "From the gradient of the base model on the training rows.",
        "-sum_m <dL/dW_m, dW_m>",
        "",
        "gradient",
    ),
    SelectionMethod(
        NORMALISED,
        "the same, divided by the update's norm: its direction alone",
        "Large updates gain nothing by their size.",
        "-sum_m <dL/dW_m, dW_m> / |dW|_F",
        "",
        "gradient",
    ),
    SelectionMethod(
        "cosine",
        "cosine of the update with that of a target LoRA",
        "From r x r products of the factors.",
        "sum_m <dW_m, dT_m> / sqrt(sum_m |dW_m|^2 sum_m |dT_m|^2 + 1e-6)",
        PAPER,
        "target",
        aggregates=True,
    ),
    SelectionMethod(
        "clamp-pm",
        "the same, with a module's product counted where it is positive",
        "From r x r products of the factors.",
        "as cosine, with max(0, <dW_m, dT_m>)",
        PAPER,
        "target",
        aggregates=True,
    ),
    SelectionMethod(
        "clamp",
        "the same, with an entry's product counted where it is positive",
        "Looks at every entry of the updates, a block of rows at a time.",
        "as cosine, with sum_ij max(0, dW_ij dT_ij)",
        PAPER,
        "target",
        aggregates=True,
    ),
    SelectionMethod(
        "abs",
        "the same, with the sizes of the entries' products",
        "Looks at every entry of the updates, a block of rows at a time.",
        "as cosine, with sum_ij |dW_ij dT_ij|",
        PAPER,
        "target",
        aggregates=True,
    ),
    SelectionMethod(
        "quasi-fim",
        "the same, on squared entries: where both change the model, whichever way",
        "Looks at every entry of the updates, a block of rows at a time.",
        "sqrt of the cosine of the dW_ij^2 and dT_ij^2",
        PAPER,
        "target",
        aggregates=True,
    ),
    SelectionMethod(
        L2,
        "distance of the update from that of a target LoRA, the nearest first",
        "From r x r products of the factors; a module that one lacks counts as zero.",
        "-log(1 + sum_m |dW_m - dT_m|_F^2)",
        PAPER,
        "target",
    ),
    SelectionMethod(
        CARD,
        "by words: the task's inputs and answers against cards, tags and names, without any model",
        "BM25 over the index. Free, and as good as what strangers write: adapters without a card "
        "that says what they are for score 0.",
        "BM25 of the task's words",
        "",
        "index",
    ),
)
METHODS: Mapping[str, SelectionMethod] = {method.name: method for method in _ROWS}
AGGREGATES = ("macro", "micro")


def find_selection_method(name: str) -> SelectionMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("selection method", name, METHODS)
    return METHODS[name]
