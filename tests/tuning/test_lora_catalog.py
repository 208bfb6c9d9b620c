"""The ways to train a LoRA: what the catalog says, and that what it offers together works."""

import itertools

import pytest
import torch
from support.plain import CLOSED_ROWS

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.errors import InputError
from recycle_cli.parameters import Value
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_catalog import (
    AXES,
    OPTIONS,
    LoraOption,
    check_combination,
    lora_pace,
    names_on,
)
from recycle_cli.tuning.lora_form import LoraForm, Setup, former_of, train_form
from recycle_cli.tuning.parameters import PARAMETERS
from recycle_cli.tuning.target_lora import LoraRecipe

UNUSUAL = [option for option in OPTIONS.values() if option.name != AXES[option.axis]]
PAIRS = [
    (one, other)
    for one, other in itertools.product(UNUSUAL, UNUSUAL)
    if one.axis == "optimizer" != other.axis
]
REFUSED = [pair for pair in PAIRS if pair[1].name in pair[0].refuses]
ALLOWED = [pair for pair in PAIRS if pair not in REFUSED]
RECIPE = LoraRecipe(rank=2, alpha=4, dropout=0.1, target_modules=("q_proj", "down_proj"))


def named(pair: tuple[LoraOption, LoraOption]) -> str:
    return "+".join(option.name for option in pair)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def trained(base: BaseModel, examples: list[Example], **given: str) -> tuple[LoraForm, list[float]]:
    """Three steps; gives the form, and the losses at each validation on the training rows."""
    settings = METHODS["lora"].settings(given, target=False)
    lr = 0.2 if OPTIONS[given["optimizer"]].pace.get("lr", 0) >= 1 else 0.02
    plan = TrainingPlan(steps=3, lr=lr, batch_size=6, eval_every=1, warmup=0.0)
    setup = Setup(base, RECIPE, plan, examples)
    with former_of(settings)(setup) as form:
        result, _ = train_form(setup, form, examples, plan, Silent())
        return form, [loss for _, loss in result.history]


@pytest.mark.parametrize(
    ("given", "lr"),
    [
        ({}, 1e-3),
        ({"optimizer": "rite"}, 3e-4),
        ({"optimizer": "loraplus"}, 1e-3 / 3),
        ({"allocation": "hetero"}, 2e-3),
        ({"allocation": "hetero", "schedule": "copra"}, 4e-3),
        # A rate of an optimizer's own is on another scale.
        ({"allocation": "hetero", "optimizer": "oplora"}, 1.0),
    ],
)
def test_a_default_rate_is_the_usual_one_so_many_times(given: dict[str, Value], lr: float) -> None:
    assert lora_pace(given, lr=1e-3) == {"lr": pytest.approx(lr)}


@pytest.mark.parametrize("pair", ALLOWED, ids=map(named, ALLOWED))
def test_what_goes_together_trains_together(
    pico_base: BaseModel, examples: list[Example], pair: tuple[LoraOption, LoraOption]
) -> None:
    given = {option.axis: option.name for option in pair}
    form, losses = trained(pico_base, examples, **given)
    assert min(losses[1:]) < losses[0] - 1e-3
    assert all(bool(torch.isfinite(p).all()) for p in form.parameters.values())


@pytest.mark.parametrize("pair", REFUSED, ids=map(named, REFUSED))
def test_what_does_not_is_refused_by_both_names(pair: tuple[LoraOption, LoraOption]) -> None:
    given = {option.axis: option.name for option in pair}
    with pytest.raises(InputError) as caught:
        METHODS["lora"].settings(given, target=False)
    for option in pair:
        assert option.words in caught.value.message


def test_every_row_is_whole() -> None:
    for option in OPTIONS.values():
        assert option.axis in AXES
        assert set(option.defaults) <= set(PARAMETERS)
        for name, value in option.defaults.items():
            PARAMETERS[name].check(value)
        for name, reason in option.refuses.items():
            assert OPTIONS[name].axis != option.axis
            assert name != AXES[OPTIONS[name].axis], "what is usual goes with everything"
            assert not reason.endswith(".")
        assert option.target == "" or callable(option.layer())
        assert (option.target == "") == (option.name == AXES[option.axis])
    for axis, usual in AXES.items():
        assert usual in names_on(axis)
        assert set(PARAMETERS[axis].choices) >= set(names_on(axis))
    assert len({option.name for option in OPTIONS.values()}) == len(OPTIONS)


def test_the_usual_ones_go_together() -> None:
    check_combination({})
    assert METHODS["lora"].settings({}, target=False) == dict(AXES)
