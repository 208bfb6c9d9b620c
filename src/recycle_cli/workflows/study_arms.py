"""The arms of a study: what its grid compares, each with the control that it has to beat."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from recycle_cli.records import ArmRole, StudyArm
from recycle_cli.tuning.catalog import NGOPT, find_tuning_method
from recycle_cli.workflows.study_config import GridBlock, MethodChoice, StudyConfig
from recycle_cli.workflows.tune_request import LORA

BASE, TARGET, RESCALED, SINGLE = "base", "target", "rescaled-target", "single"
RESCALE = "rescale"
RANDOM = "random"


@dataclass(frozen=True)
class Arm:
    """One way to get an adapter.

    Args:
        name: what tables call it.
        label: what sentences call it.
        role: what it is to the verdict.
        choice: the method that makes it of adapters of the pool, where one does.
        selection: how its adapters are chosen, where it has some.
        k: how many.
        with_target: whether the target LoRA stands beside them.
        reinit: whether random adapters take the place of the pool's.
        control: the name of the arm that is the same with random adapters.
    """

    name: str
    label: str
    role: ArmRole
    choice: MethodChoice | None = None
    selection: str | None = None
    k: int | None = None
    with_target: bool = False
    reinit: bool = False
    control: str | None = None

    @property
    def method(self) -> str | None:
        """Of `tune` or `merge`; None for the base model and an adapter of the pool as it is."""
        if self.choice is not None:
            return self.choice.method
        return {"target": LORA, "rescaled": RESCALE}.get(self.role)

    @property
    def needs_target(self) -> bool:
        """Whether it takes the target LoRA."""
        return self.with_target or self.role == "target"

    def described(self) -> StudyArm:
        """As the study's document has it."""
        return StudyArm(
            name=self.name,
            label=self.label,
            role=self.role,
            method=self.method,
            selection=self.selection,
            k=self.k,
            with_target=self.with_target,
            settings=self.choice.given if self.choice else {},
            control=self.control,
        )


def arms_of(config: StudyConfig) -> list[Arm]:
    """The arms of a study, each once: the base model, the target LoRA, then the grid's."""
    found = {
        BASE: Arm(BASE, "the base model", "base"),
        TARGET: Arm(TARGET, "the target LoRA", "target"),
    }
    words = _Words(config)
    for block in config.grid:
        for arm in _block_arms(block, config, words):
            known = found.setdefault(arm.name, arm)
            if known.control is None and arm.control is not None:
                found[arm.name] = arm  # another block asks for its control too
    return list(found.values())


class _Words:
    """What has to be said of an arm: only what differs between arms."""

    def __init__(self, config: StudyConfig) -> None:
        self.selections = {name for block in config.grid for name in block.selection}
        self.counts = {count for block in config.grid for count in block.k}
        self.choices = {choice.name: choice for block in config.grid for choice in block.methods}

    def name(self, choice: MethodChoice) -> str:
        """Of a method; with its settings where it is run with others too."""
        alone = sum(one.method == choice.method for one in self.choices.values()) == 1
        return choice.method if alone else choice.name

    def suffix(self, selection: str, k: int) -> str:
        by_count = f" k={k}" if len(self.counts) > 1 else ""
        return by_count + (f" by {selection}" if len(self.selections) > 1 else "")


def _block_arms(block: GridBlock, config: StudyConfig, words: _Words) -> Iterator[Arm]:
    for selection, k in product(block.selection, block.k):
        for choice, with_target in product(block.methods, block.with_target):
            suffix = words.suffix(selection, k)
            arm = Arm(
                name=f"{words.name(choice)}{'+target' if with_target else ''}{suffix}",
                label=f"{words.name(choice)} of recycled adapters"
                f"{' with the target LoRA' if with_target else ''}{suffix}",
                role="recycled",
                choice=choice,
                selection=selection,
                k=k,
                with_target=with_target,
            )
            if RANDOM in block.controls and not choice.merges:
                twin = _random_twin(arm)
                yield replace(arm, control=twin.name)
                yield twin
            else:
                yield arm
    for selection in block.selection if SINGLE in block.controls else ():
        name = SINGLE + (f" by {selection}" if len(words.selections) > 1 else "")
        label = "the adapter that the selection puts first, as it is"
        yield Arm(name, label, "single", selection=selection, k=1)
    if RESCALE in block.controls:
        yield Arm(RESCALED, "the target LoRA rescaled alone", "rescaled", with_target=True)


def _random_twin(arm: Arm) -> Arm:
    """The same with random adapters, of the same spread as those of the pool."""
    return replace(
        arm,
        name=f"random {arm.name}",
        label=arm.label.replace("recycled adapters", "random adapters"),
        role="control",
        reinit=True,
    )


def pace_of(arm: Arm, config: StudyConfig) -> dict[str, Any]:
    """How an arm trains: what the study says, unless its method says otherwise. A search without
    gradients goes by its own pace alone."""
    if arm.role == "target":
        return config.target.pace
    own = arm.choice.pace if arm.choice else {}
    parameters = arm.choice.parameters if arm.choice else {}
    defaults = find_tuning_method(arm.method or "").defaults
    searches = {**defaults, **parameters}.get("optimizer") == NGOPT
    return own if searches else {**config.pace, **own}
