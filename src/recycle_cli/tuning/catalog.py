"""The tuning methods there are. A new one is a file beside this one and a row here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from recycle_cli.errors import unknown_name


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune.

    Args:
        name: what `--method` takes.
        summary: one line for the help.
        paper: its source.
        mixes: whether it mixes given adapters (else it trains a LoRA of its own).
        target_only: whether the target LoRA is the only adapter it takes.
        mixture: what `tuning.mixture.MixtureRecipe` takes, where it is not at its defaults.
        lr: peak learning rate.
        steps: optimizer steps.
    """

    name: str
    summary: str
    paper: str
    mixes: bool
    target_only: bool = False
    mixture: Mapping[str, str | float | bool] = field(default_factory=dict)
    lr: float = 5e-2
    steps: int = 100


METHODS: Mapping[str, TuningMethod] = {
    method.name: method
    for method in (
        TuningMethod(
            "recycle",
            "adaptive merging: one coefficient per adapter and module, from zero",
            "arXiv 2602.12323",
            mixes=True,
        ),
        TuningMethod(
            "adamerging",
            "the same from equal shares, without an activation (supervised AdaMerging)",
            "arXiv 2310.02575",
            mixes=True,
            mixture={"activation": "linear", "init": "equal"},
        ),
        TuningMethod(
            "rescale",
            "control: the target LoRA alone with learned module coefficients, from one",
            "arXiv 2602.12323",
            mixes=True,
            target_only=True,
            mixture={"activation": "linear", "init": "one"},
        ),
        TuningMethod(
            "lora", "a target LoRA of its own", "arXiv 2106.09685", mixes=False, lr=3e-4, steps=400
        ),
    )
}


def find_tuning_method(name: str) -> TuningMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("tuning method", name, METHODS)
    return METHODS[name]
