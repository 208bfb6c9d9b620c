"""A run that was killed and gone on with ends bit for bit as one that was left alone."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.plain import CLOSED_ROWS, mixed_updates
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.store import STATE_FILE, Snapshot, Store
from recycle_cli.engine.training import Hooks, Trained, TrainingPlan, train
from recycle_cli.errors import InputError
from recycle_cli.progress import Progress, Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.choices import LR_SCHEDULES
from recycle_cli.tuning.lora_catalog import OPTIONS, names_on
from recycle_cli.tuning.lora_form import Setup, former_of, train_form
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe
from recycle_cli.tuning.target_lora import LoraRecipe
from recycle_cli.tuning.tuned import fit

# One or two rows a step, so that their order counts; four steps an epoch.
PLAN = TrainingPlan(
    steps=11, lr=0.05, batch_size=1, eval_every=3, warmup=0.2, weight_decay=0.1, seed=4
)
RUN = {"method": "recycle", "lr": 0.05}


class Killed(Exception):
    """Stands for a signal: nothing of ours catches it."""


class KilledAfter(Silent):
    """A progress during which the process dies."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@dataclass
class Counted(Silent):
    """A progress that counts the steps that were computed, and those that were not again."""

    computed: int = 0
    known: int = 0
    said: str = ""

    def advance(self, note: str = "") -> None:
        self.computed += bool(note)
        self.known += not note

    def message(self, text: str) -> None:
        self.said += text


Ended = tuple[Trained, dict[str, Tensor]]
Start = Callable[[Progress, Store | None], Ended]
"""Sets a run up from nothing, as a new process does, and runs it to the end."""


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:4])


@pytest.fixture(scope="module")
def valid(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[4:])


def of_mixture(
    base: BaseModel, rows: Sequence[Sequence[Example]], plan: TrainingPlan, recipe: MixtureRecipe
) -> Start:
    def start(progress: Progress, store: Store | None) -> Ended:
        mixture = Mixture(mixed_updates(base), recipe, base.compute.device, seed=plan.seed)
        trained, _ = fit(base, mixture, *rows, plan, progress, store)
        return trained, copy.deepcopy(dict(mixture.named_parameters()))

    return start


def of_lora(
    base: BaseModel,
    rows: Sequence[Sequence[Example]],
    plan: TrainingPlan,
    recipe: LoraRecipe,
    **given: str,
) -> Start:
    settings = METHODS["lora"].settings(given, target=False)

    def start(progress: Progress, store: Store | None) -> Ended:
        setup = Setup(base, recipe, plan, rows[0])
        with former_of(settings)(setup) as form:
            trained, _ = train_form(setup, form, rows[1], plan, progress, store)
            return trained, copy.deepcopy(dict(form.parameters))

    return start


def assert_same(one: Ended, other: Ended) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, parameter in one[1].items():
        assert torch.equal(parameter, other[1][name]), name


def assert_resumes(start: Start, folder: Path, killed_after: int, saved_at: int) -> None:
    """Kills a run after some steps, goes on with it, and compares it with one left alone."""
    undisturbed = start(Silent(), None)
    steps = Counted()
    start(steps, None)
    torch.manual_seed(99)  # a new process has other random numbers
    with pytest.raises(Killed):
        start(KilledAfter(killed_after), Store(folder, RUN))
    torch.manual_seed(100)
    progress = Counted()
    resumed = start(progress, Store(folder, RUN))
    assert_same(resumed, undisturbed)
    assert (progress.known, progress.known + progress.computed) == (saved_at, steps.computed)
    assert (f"step {saved_at}" in progress.said) == (saved_at > 0)


@pytest.mark.parametrize(
    ("schedule", "killed_after", "saved_at"),
    [
        *((schedule, 5, 3) for schedule in LR_SCHEDULES),
        # Before anything is kept; just after; before the last step; after it.
        *(("cosine", *steps) for steps in ((2, 0), (3, 3), (10, 9), (11, 11))),
    ],
)
def test_a_mixture(
    pico_base: BaseModel,
    examples: list[Example],
    valid: list[Example],
    tmp_path: Path,
    schedule: str,
    killed_after: int,
    saved_at: int,
) -> None:
    plan = replace(PLAN, lr_schedule=schedule)
    start = of_mixture(pico_base, (examples, valid), plan, MixtureRecipe("linear", "normal"))
    assert_resumes(start, tmp_path, killed_after, saved_at)


@pytest.mark.parametrize("factors", ["new", "all"])
def test_a_mixture_whose_factors_are_trained(
    pico_base: BaseModel,
    examples: list[Example],
    valid: list[Example],
    tmp_path: Path,
    factors: str,
) -> None:
    recipe = MixtureRecipe("softmax", "equal", affine=True, factors=factors)  # type: ignore[arg-type]
    start = of_mixture(pico_base, (examples, valid), PLAN, recipe)
    assert_resumes(start, tmp_path, 8, 6)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_a_target_lora_with_dropout(
    pico_base: BaseModel,
    examples: list[Example],
    valid: list[Example],
    tmp_path: Path,
    schedule: str,
) -> None:
    recipe = LoraRecipe(rank=3, alpha=6, dropout=0.4, target_modules=("q_proj", "up_proj"))
    plan = replace(PLAN, lr_schedule=schedule)
    assert_resumes(of_lora(pico_base, (examples, valid), plan, recipe), tmp_path, 7, 6)


@pytest.mark.parametrize("name", names_on("optimizer"))
def test_a_target_lora_by_every_optimizer(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path, name: str
) -> None:
    plan = replace(PLAN, lr=OPTIONS[name].pace.get("lr", PLAN.lr), weight_decay=0.0)
    recipe = LoraRecipe(rank=4, alpha=6, dropout=0.4, target_modules=("q_proj", "up_proj"))
    start = of_lora(pico_base, (examples, examples), plan, recipe, optimizer=name)
    trained, factors = start(Silent(), None)
    assert trained.best_step > 0
    assert all(factor.any() for key, factor in factors.items() if "lora_B" in key)
    assert_resumes(start, tmp_path, 8, 6)


def test_checkpointing_and_small_passes(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    recipe = LoraRecipe(rank=2, dropout=0.4, target_modules=("q_proj",))
    plan = replace(PLAN, batch_size=3, micro_batch=2, checkpointing=True)
    assert_resumes(of_lora(pico_base, (examples, valid), plan, recipe), tmp_path, 4, 3)


def test_killed_again_and_again(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    recipe = LoraRecipe(rank=2, dropout=0.4, target_modules=("v_proj",))
    start = of_lora(pico_base, (examples, valid), PLAN, recipe)
    store = Store(tmp_path, RUN)
    # Steps that are known are told too: each run dies one to four steps on.
    for steps in (4, 6, 10, 11):
        with pytest.raises(Killed):
            start(KilledAfter(steps), store)
    assert_same(start(Silent(), store), start(Silent(), None))


def test_a_run_that_had_ended_ends_the_same(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    start = of_mixture(pico_base, (examples, valid), PLAN, MixtureRecipe("linear"))
    store, progress = Store(tmp_path, RUN), Counted()
    first = start(Silent(), store)
    assert_same(start(progress, store), first)
    assert (progress.known, progress.computed) == (PLAN.steps, 0)


def test_a_run_that_patience_had_ended(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    plan = replace(PLAN, lr=30.0, warmup=0.0, eval_every=1, patience=3, steps=40)
    start = of_mixture(pico_base, (examples, valid), plan, MixtureRecipe("linear"))
    undisturbed, _ = start(Silent(), None)
    assert len(undisturbed.history) < 30
    assert_resumes(start, tmp_path, 2, 2)
    assert_resumes(
        start, tmp_path / "last", undisturbed.history[-1][0], len(undisturbed.history) - 1
    )


def test_what_a_method_changes_meanwhile_is_kept(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    """A buffer that every step adds to, and that the loss depends on."""

    def start(progress: Progress, store: Store | None) -> Ended:
        mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear"), torch.device("cpu"))
        pull = torch.zeros(3)
        row = mixture.coefficients[0]

        def after_step() -> None:
            assert row.grad is not None
            pull.add_(row.grad.abs())

        hooks = Hooks(
            penalty=lambda: ((row - pull) ** 2).sum(),
            after_step=after_step,
            buffers={"pull": pull},
        )
        parameters = dict(mixture.named_parameters())
        with mixture.attached(pico_base):
            trained = train(pico_base, parameters, examples, valid, PLAN, progress, hooks, store)
        return trained, copy.deepcopy({**parameters, "pull": pull})

    assert_resumes(start, tmp_path, 8, 6)


# --- what is kept --------------------------------------------------------------------------------


def snapshot(step: int = 5) -> Snapshot:
    tensors = {"now.a": torch.arange(6.0).view(2, 3).T, "random.cpu": torch.arange(5).byte()}
    return Snapshot(tensors, step, 3, 1, [(0, 1 / 3), (3, 0.1), (5, math.pi)])


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep/inside", RUN)
    assert store.load() is None
    for step in (4, 5):
        store.save(snapshot(step))
    loaded = store.load()
    assert loaded is not None
    assert dataclasses.replace(loaded, tensors={}) == dataclasses.replace(snapshot(), tensors={})
    assert loaded.tensors.keys() == snapshot().tensors.keys()
    for name, tensor in snapshot().tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    assert [path.name for path in store.folder.iterdir()] == [STATE_FILE]


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tensors = {"whole": whole, "part": whole[2:4], "again": whole}
    Store(tmp_path, RUN).save(replace(snapshot(), tensors=tensors))
    loaded = Store(tmp_path, RUN).load()
    assert loaded is not None
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path, {**RUN, "seed": 0, "adapters": ["a", "b"]}).save(snapshot())
    with pytest.raises(InputError) as caught:
        Store(tmp_path, {**RUN, "seed": 1, "adapters": ["b", "a"], "rows": 5}).load()
    assert caught.value.message.endswith("differs in adapters, rows, seed")
    assert "--force" in caught.value.hint


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def overwritten(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def replaced(path: Path) -> None:
    save_file({"now.a": torch.zeros(2)}, path)


def misspelt(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"best_step", b"best_stop"))


def nameless(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"run\\"', b'\\"ran\\"'))


def turned_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [emptied, cut_short, overwritten, replaced, misspelt, nameless, turned_into_a_folder],
)
def test_a_damaged_state_is_refused_in_words(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store, file = Store(tmp_path, RUN), tmp_path / STATE_FILE
    store.save(snapshot())
    before = file.read_bytes()
    damage(file)
    assert file.is_dir() or file.read_bytes() != before
    with pytest.raises(InputError, match=f"{STATE_FILE} cannot be read") as caught:
        store.load()
    assert str(tmp_path) in caught.value.hint


def test_a_kill_while_the_state_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    store = Store(tmp_path, RUN)
    store.save(snapshot(4))
    (tmp_path / f"{STATE_FILE}.new").write_bytes(b"half of")
    loaded = store.load()
    assert loaded is not None
    assert loaded.step == 4
    store.save(snapshot(5))
    loaded = store.load()
    assert loaded is not None
    assert loaded.step == 5
