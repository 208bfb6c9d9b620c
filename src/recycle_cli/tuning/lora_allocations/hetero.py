"""HeteroLoRA (arXiv 2406.14956): some modules get LoRAs of a large rank, the others none.

A proxy scores all modules. Those that score best get the rank r / share, one after the other, as
long as they hold no more numbers together than LoRAs of rank r in every module would. Ties are
broken by chance. A module has no larger rank than its smaller side; the scale is alpha over the
large rank that it can have.

- static: they are scored once, before the training. What is left of the budget makes a LoRA of a
  smaller rank in the next module.
- dynamic: they are scored again and again during the training, with the LoRAs of all modules
  switched on. That of a module that is switched off keeps its numbers, and neither acts nor is
  trained.

What is scored has a large LoRA in every module, so that is what has to fit into memory.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import tensor_bytes
from recycle_cli.engine.checkpointing import gradient_checkpointing
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import collate
from recycle_cli.engine.training import Hooks, TrainingPlan, train
from recycle_cli.errors import InputError
from recycle_cli.lora.draws import generator_for
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_allocations.proxies import BATCHES, PROXIES
from recycle_cli.tuning.lora_architectures.fresh import Target, lora_targets
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup, form_budget, ordinary
from recycle_cli.tuning.peft_layers import factor_pair, lora_update, peft_layers, switch
from recycle_cli.tuning.target_lora import LoraRecipe

Targets = Mapping[str, Target]


@contextlib.contextmanager
def hetero(
    setup: Setup,
    within: Former,
    *,
    proxy: str,
    share: float,
    proxy_steps: int,
    reallocate_every: int,
) -> Iterator[LoraForm]:
    """HeteroLoRA around another form: see `lora_form`.

    Raises:
        InputError: the proxy needs factors that have been trained a little, or no module scores.
    """
    targets = lora_targets(setup.base, setup.recipe)
    large = replace(setup, recipe=enlarged(setup.recipe, targets, share))
    if reallocate_every:
        with within(large) as form:
            made = Reallocation(large, targets, proxy=proxy, share=share, every=reallocate_every)
            yield _reallocated(form, made)
    elif setup.only_measured:
        with within(large) as form:
            yield replace(form, later=form.later + _last_state(form, proxy_steps))
    else:
        ranks = allotted(targets, _first_scores(large, proxy, proxy_steps), share, setup.plan.seed)
        allocated = replace(setup, recipe=with_ranks(setup.recipe, targets, ranks, share))
        with within(allocated) as form:
            yield form.then(Hooks(), lambda: _told(targets, ranks))


def _reallocated(form: LoraForm, made: "Reallocation") -> LoraForm:
    """A form with large LoRAs in all modules, scored and switched while it is trained."""
    # While scores are taken: the sum of the gradients, and those of a pass, beside the last step's.
    scoring = 2 * tensor_bytes(form.parameters.values())
    form = replace(
        form,
        update=lambda: lora_update(made.setup.base, made.enabled()),
        save=None,
        later=form.later + scoring,
        begin=made.begin,
    )
    return form.then(made.hooks(), made.settle)


def _first_scores(setup: Setup, proxy: str, steps: int) -> dict[str, float]:
    """The scores of modules with large ranks, before training or after a little of it, of which
    nothing else is kept.

    Raises:
        RecycleError: the memory does not suffice, or the loss is no longer a finite number.
    """
    with ordinary(setup) as form:
        form = replace(form, later=_last_state(form, steps))
        plan = form_budget(setup, form, setup.max_memory).fitted(setup.plan)
        if steps:
            _train_a_little(setup, form, replace(plan, steps=steps, eval_every=steps))
        return score(setup.base, proxy, setup.examples, plan)


def _last_state(form: LoraForm, steps: int) -> int:
    """Bytes of what `_train_a_little` keeps beside the best state."""
    return tensor_bytes(form.parameters.values()) if steps else 0


def _train_a_little(setup: Setup, form: LoraForm, plan: TrainingPlan) -> None:
    """Trains to the last step, which need not be the best: from the start of a LoRA, where B is
    zero, there would be nothing to score."""
    last: dict[str, Tensor] = {}

    def keep() -> None:
        last.update({name: p.detach().clone() for name, p in form.parameters.items()})

    hooks = form.hooks.then(Hooks(after_step=keep))
    # The loop validates on something; what it finds is not used.
    train(setup.base, form.parameters, setup.examples, setup.examples[:1], plan, Silent(), hooks)
    with torch.no_grad():
        for name, parameter in form.parameters.items():
            parameter.copy_(last[name])


def _told(targets: Targets, ranks: Mapping[str, int]) -> dict[str, float]:
    """How many modules have a LoRA, and how many numbers that is of the uniform baseline's."""
    trained = sum(rank * sum(targets[path].shape) for path, rank in ranks.items())
    return {"modules_on": float(len(ranks)), "share_of_uniform": trained / budget(targets)}


def budget(targets: Targets) -> int:
    """The trained numbers of a LoRA in every module."""
    return sum(target.rank * sum(target.shape) for target in targets.values())


def wanted_rank(target: Target, share: float) -> int:
    """The large rank of a module: r / share, and no more than the module can have."""
    return min(math.ceil(target.rank / share), *target.shape)


def enlarged(recipe: LoraRecipe, targets: Targets, share: float) -> LoraRecipe:
    """The recipe with every module at its large rank."""
    ranks = {path: wanted_rank(target, share) for path, target in targets.items()}
    return with_ranks(recipe, targets, ranks, share)


def with_ranks(
    recipe: LoraRecipe, targets: Targets, ranks: Mapping[str, int], share: float
) -> LoraRecipe:
    """The recipe with these ranks in these modules, and in no others.

    The scale of each is that of the large rank it can have, however large its own is.
    """
    power = 0.5 if recipe.use_rslora else 1
    usual = max(ranks.values())
    alphas = {
        path: targets[path].alpha * (rank / wanted_rank(targets[path], share)) ** power
        for path, rank in ranks.items()
    }
    return replace(
        recipe,
        rank=usual,
        target_modules=tuple(ranks),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != usual},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != recipe.alpha},
    )


def allotted(
    targets: Targets, scores: Mapping[str, float], share: float, *key: object
) -> dict[str, int]:
    """The ranks of the modules that get a LoRA, by path, best first.

    Args:
        targets: all modules, with their ranks in the uniform baseline.
        scores: from 0; a module with 0 gets nothing.
        share: in (0, 1], of the modules that get one.
        key: of the chance that breaks ties.

    Raises:
        InputError: all scores are 0.
    """
    if not any(scores.values()):
        raise InputError(
            "no module would gain from a LoRA by --proxy: all scores are 0",
            "use another --proxy, or --allocation uniform",
        )
    left, ranks = budget(targets), {}
    for path in _best_first(scores, *key):
        wanted, each = wanted_rank(targets[path], share), sum(targets[path].shape)
        rank = min(wanted, left // each)
        if rank > 0:
            ranks[path] = rank
            left -= rank * each
        if rank < wanted:
            break
    return ranks


def _best_first(scores: Mapping[str, float], *key: object) -> list[str]:
    paths = [path for path, score in scores.items() if score > 0]
    chance = torch.randperm(len(paths), generator=generator_for("ties", *key)).tolist()
    return sorted((paths[at] for at in chance), key=lambda path: scores[path], reverse=True)


def score(
    base: BaseModel, proxy: str, examples: Sequence[Example], plan: TrainingPlan
) -> dict[str, float]:
    """What a proxy gives for the modules that PEFT's LoRAs are on, by path.

    Args:
        base: the model, wrapped.
        proxy: a key of `PROXIES`.
        examples: the training rows; the first ones are looked at, `BATCHES` batches at most.
        plan: how many rows are in a batch, and in a pass, and whether activations are kept.

    Raises:
        InputError: the proxy needs factors that have been trained a little.
        Diverged: the loss is no finite number.
    """
    layers = peft_layers(base)
    pairs = {path: factor_pair(layer) for path, layer in layers.items()}
    rows = examples[: BATCHES * plan.batch_size]
    size = plan.rows_a_pass
    # Layers that are run again cannot add to a cache of keys and values twice.
    shared = 0 if plan.checkpointing else shared_length([example.prompt for example in examples])
    starts = range(0, len(rows), size)
    batches = [collate(base, rows[start : start + size], shared) for start in starts]
    modes = [layer.training for layer in layers.values()]
    around = gradient_checkpointing(base) if plan.checkpointing else contextlib.nullcontext()
    try:
        for layer in layers.values():
            layer.eval()  # so that dropout draws nothing
        with around:
            return PROXIES[proxy](base, pairs, batches)
    finally:
        for layer, mode in zip(layers.values(), modes, strict=True):
            layer.train(mode)


class Reallocation:
    """Scores and switches during a training.

    Attributes:
        on: (modules,) float32, 1 where a LoRA is switched on.
        times_on: (modules,) float32, after how many scorings each was.
        steps_done: () int64.
    """

    def __init__(
        self,
        setup: Setup,
        targets: Targets,
        *,
        proxy: str,
        share: float,
        every: int,
    ) -> None:
        self.setup, self.targets = setup, targets
        self.proxy, self.share, self.every = proxy, share, every
        self.layers = peft_layers(setup.base)
        self.on = torch.ones(len(self.layers), device=setup.base.compute.device)
        self.times_on = torch.zeros_like(self.on)
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self._plan: TrainingPlan | None = None
        self._scored_at: int | None = None

    def begin(self, plan: TrainingPlan) -> None:
        """Lets it score from here on, in passes that fit into memory; what only measures that has
        no need of scores."""
        self._plan = plan

    def set_training(self, on: bool) -> None:
        """Scores where it is time to, before a step; switches as the last scores say."""
        step = int(self.steps_done)
        if on and self._plan and step % self.every == 0 and step != self._scored_at:
            self._allot(self._plan)
            self._scored_at = step
        self.switch()

    def switch(self) -> None:
        """Lets the LoRAs that are on act, and no others."""
        switch(self.layers, self.enabled())

    def enabled(self) -> list[str]:
        """The paths of the modules whose LoRAs are on."""
        return [path for path, on in zip(self.layers, self.on.tolist(), strict=True) if on]

    def _allot(self, plan: TrainingPlan) -> None:
        switch(self.layers, self.layers)
        scores = score(self.setup.base, self.proxy, self.setup.examples, plan)
        ranks = allotted(self.targets, scores, self.share, plan.seed, int(self.steps_done))
        whole = {p for p, rank in ranks.items() if rank == wanted_rank(self.targets[p], self.share)}
        on = [float(path in (whole or ranks)) for path in self.layers]
        self.on.copy_(torch.tensor(on))
        self.times_on += self.on

    def after_step(self) -> None:
        """Counts."""
        self.steps_done += 1

    def hooks(self) -> Hooks:
        """What the training loop calls."""
        return Hooks(
            set_training=self.set_training,
            after_step=self.after_step,
            buffers={"hetero.times_on": self.times_on, "hetero.steps_done": self.steps_done},
            kept={"hetero.on": self.on},
        )

    def settle(self) -> dict[str, float]:
        """Switches as the best state says; tells how often modules were scored, which of them are
        on as `_told` does, and how many ever were."""
        self.switch()
        scorings = -(-int(self.steps_done) // self.every)
        on = {path: wanted_rank(self.targets[path], self.share) for path in self.enabled()}
        return {
            "scorings": float(scorings),
            **_told(self.targets, on),
            "modules_ever_on": float((self.times_on > 0).sum()),
        }
