"""What a step costs of each way to train a target LoRA, beside AdamW on an ordinary one, in turns.

`python -m bench.target --option NAME` times one of them.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.timing import Measured, machine, measure
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.training import Parameters, TrainingPlan
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.lora.draws import generator_for
from recycle_cli.progress import Silent
from recycle_cli.settings import read_settings
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_catalog import AXES, OPTIONS, LoraOption, lora_pace
from recycle_cli.tuning.lora_form import LoraForm, Setup, former_of, train_form
from recycle_cli.tuning.target_lora import LoraRecipe

HEADER = (
    "| option | seconds a step | times AdamW's | memory beyond the model | times AdamW's "
    "| numbers trained | optimizer's numbers for each |\n|---|---|---|---|---|---|---|"
)
USUAL = "adamw"
RECIPE = LoraRecipe(rank=16, alpha=32, dropout=0.0)
ROWS, PROMPT, ANSWER = 8, 120, 8
STEPS, TURNS, TOGETHER = 5, 2, 4


def unusual() -> list[LoraOption]:
    """All that the catalog offers beside the ordinary."""
    return [option for option in OPTIONS.values() if option.name != AXES[option.axis]]


def way_names() -> list[str]:
    """The ordinary way and all others."""
    return [USUAL, *(option.name for option in unusual())]


def given_by(way: str) -> dict[str, str]:
    """The option that asks for it."""
    return {OPTIONS[way].axis: way}


class Stopwatch(Silent):
    """A progress that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def advance(self, note: str = "") -> None:
        """Notes it."""
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step but the first, in which kernels are made ready."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


@dataclass
class Cost:
    """What trainings of one kind took, turn by turn: the seconds of their steps, and the memory
    that each turn held at most beyond the model."""

    seconds: list[float] = field(default_factory=list)
    turns: list[Measured] = field(default_factory=list)
    trained: int = 0
    kept: int = 0

    @property
    def step(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int:
        """The largest turn's, in bytes."""
        return max(turn.extra_bytes for turn in self.turns)


@dataclass(frozen=True)
class Beside:
    """An option's cost and AdamW's, measured in turns."""

    name: str
    ours: Cost
    usual: Cost

    def row(self) -> str:
        """A row of the table."""
        ours, usual = self.ours, self.usual
        seconds = ours.seconds
        cells = (
            self.name,
            f"{ours.step:.3g} ({min(seconds):.3g} to {max(seconds):.3g})",
            f"{ours.step / usual.step:.2f}",
            f"{ours.memory / 1e6:,.0f} MB",
            f"{ours.memory / usual.memory:.2f}",
            f"{ours.trained:,}",
            f"{ours.kept / ours.trained:.2f}",
        )
        return f"| {' | '.join(cells)} |"


def comparisons(names: Sequence[str] = ()) -> Iterator[Beside]:
    """Every option of the catalog, or some: a few at a time, in turns with AdamW on an ordinary
    LoRA."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    left = [option for option in unusual() if not names or option.name in names]
    while left:
        few, left = left[:TOGETHER], left[TOGETHER:]
        usual, costs = Cost(), [Cost() for _ in few]
        for _ in range(TURNS):
            _turn(base, {}, usual)
            for option, cost in zip(few, costs, strict=True):
                _turn(base, {option.axis: option.name}, cost)
        for option, cost in zip(few, costs, strict=True):
            yield Beside(f"--{option.axis} {option.name}", cost, usual)


def _turn(base: BaseModel, given: Mapping[str, str], cost: Cost) -> None:
    """Trains for some steps on rows of random tokens."""
    watch = Stopwatch()
    cost.turns.append(measure(functools.partial(_train, base, given, cost, watch)))
    cost.seconds += watch.steps()


def _train(base: BaseModel, given: Mapping[str, str], cost: Cost, watch: Stopwatch) -> None:
    pace = lora_pace(given, lr=1e-5)
    plan = TrainingPlan(steps=STEPS, eval_every=STEPS + 1, batch_size=ROWS, **pace)
    rows = _rows()
    settings = METHODS["lora"].settings(given, target=False)
    with former_of(settings)(Setup(base, RECIPE, plan, rows)) as form:
        made: list[torch.optim.Optimizer] = []
        noted = _noting(form, made)
        # The last step is validated; one short row keeps that out of the way.
        train_form(Setup(base, RECIPE, plan, rows), noted, rows[:1], plan, watch)
        cost.trained = sum(p.numel() for p in form.parameters.values() if p.requires_grad)
        states = made[0].state_dict()["state"].values()
        tensors = [value for state in states for value in state.values()]
        cost.kept = sum(value.numel() for value in tensors if isinstance(value, torch.Tensor))


def _noting(form: LoraForm, made: list[torch.optim.Optimizer]) -> LoraForm:
    """The form, with its optimizer put on a list."""

    def optimizer(parameters: Parameters, plan: TrainingPlan) -> torch.optim.Optimizer:
        made.append(form.hooks.optimizer(parameters, plan))
        return made[-1]

    return replace(form, hooks=replace(form.hooks, optimizer=optimizer))


def _rows() -> list[Example]:
    """Rows of random tokens that share no beginning."""
    generator = generator_for("bench", "rows")
    tokens = torch.randint(5, 40_000, (ROWS, PROMPT + ANSWER), generator=generator).tolist()
    return [Example(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in tokens]


def main() -> None:
    """Prints the table, or some of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [option.name for option in unusual()]
    parser.add_argument("--option", action="append", choices=names, default=[], help="only these")
    options = parser.parse_args()
    print(HEADER)
    for one in comparisons(options.option):
        print(one.row(), flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
