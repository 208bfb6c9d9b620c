"""What the user of a tuned adapter should know: its warnings and its card."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.records import MixedAdapter, TuneDocument, TuneSweep
from recycle_cli.tuning.catalog import find_tuning_method
from recycle_cli.tuning.lora_catalog import AXES, chosen_options
from recycle_cli.workflows.licenses import card_licenses, license_warnings
from recycle_cli.workflows.merge_card import LOW_ENERGY
from recycle_cli.workflows.model_card import Card, CardSource
from recycle_cli.workflows.tune_request import LR, TuneRequest

if TYPE_CHECKING:
    from recycle_cli.engine.training import Trained

CONTROLS = {
    "none": "",
    "experts": " Control: the pool's adapters were replaced by noise of the same spread.",
    "norm": " Control: the pool's adapters were replaced by noise of the same norms.",
    "all": " Control: all adapters were replaced by noise of the same spread.",
}

FIGURES = {
    "absorbed": "New direction absorbed into the others (1: yes)",
    "blocks": "LoRAs of the chain in the result",
    "mean_input_ratio": "Mean ratio of the sizes of inputs that the shortcuts were written with",
    "mean_rank": "Mean rank of a module",
    "modules_ever_on": "Modules whose LoRA was ever switched on",
    "modules_on": "Modules with a LoRA",
    "new_lora_coefficient": "Mean coefficient of the new LoRA",
    "relative_error": "Relative error of the update that was written",
    "scorings": "Times that modules were scored",
    "share_of_uniform": "Trained numbers, as a share of those of a LoRA in every module",
    "unexpressed": "Squared share of the new direction that the others cannot express",
    "written_valid_loss": "Validation loss of what was written, in nats",
}
"""What a card calls the figures of methods and options."""


def tune_warnings(
    trained: "Trained",
    licenses: Sequence[str | None],
    energy_kept: float,
    routed: bool,
    sweep: TuneSweep | None = None,
) -> list[str]:
    """What may surprise: licences, a training that changed nothing, a lossy rank limit, a result
    that is no LoRA, a rate found at the end of those that were tried.

    Args:
        trained: what came of it.
        licenses: of the adapters that others made.
        energy_kept: the share of the squared norm that the export has.
        routed: whether the result chooses between adapters token by token.
        sweep: how the rate was found, where it was.
    """
    warnings = license_warnings(licenses)
    if trained.best_step == 0 and len(trained.history) > 1:
        warnings.append(
            "No step had a lower validation loss than the start, so the start was kept: "
            "training changed nothing."
        )
    if routed:
        warnings.append(
            "The result chooses between adapters token by token: it cannot be folded into a LoRA, "
            "PEFT cannot load it, and only recycle eval does."
        )
    if energy_kept < LOW_ENERGY:
        warnings.append(f"The rank limit keeps {energy_kept:.1%} of the update's energy.")
    return [*warnings, *_at_the_edge(sweep)]


def _at_the_edge(sweep: TuneSweep | None) -> list[str]:
    """That the best rate may lie beyond the grid."""
    rate = sweep.chosen.get(LR) if sweep else None
    if sweep is None or rate is None:
        return []
    for most, end, beyond in ((min, "lowest", "lower"), (max, "highest", "higher")):
        if rate == most(sweep.grid[LR]):
            return [
                f"The rate that was found, {rate:.3g}, is the {end} of those tried: the best may "
                f"be {beyond}."
            ]
    return []


def others_licenses(request: TuneRequest, adapters: Sequence[MixedAdapter]) -> list[str | None]:
    """The licences of the adapters that others made: all but a target LoRA trained here."""
    return [
        adapter.license
        for adapter in adapters
        if not (request.train_target and adapter.role == "target")
    ]


def tune_card(request: TuneRequest, document: TuneDocument) -> Card:
    """The card of the folder."""
    method, task = find_tuning_method(document.method), document.task
    licenses = others_licenses(request, document.adapters)
    what = method.summary[0].upper() + method.summary[1:]
    trained = f"tuned on {task.train_rows} rows of {task.name}"
    how = trained if document.settings["steps"] else "without training"
    return Card(
        title=Path(document.path).name,
        summary=f"{what} ({method.paper}), {how}." + CONTROLS[request.reinit],
        base_model=document.base_model,
        sources=[
            CardSource(a.id, a.revision, a.sha256, a.coefficient_mean, a.license)
            for a in document.adapters
        ],
        figure=method.figure,
        routed=method.routed,
        facts=_facts(document),
        command=shlex.join(document.command),
        warnings=document.warnings,
        licenses=[request.license] if request.license else card_licenses(licenses),
    )


def _facts(document: TuneDocument) -> list[str]:
    task = document.task
    cut = "" if document.energy_kept == 1 else f"; {document.energy_kept:.2%} of the energy is kept"
    return [
        f"Task {task.name} (rows sha256 `{task.sha256[:12]}`): {task.train_rows} rows to train "
        f"on, {task.valid_rows} to validate.",
        f"Best step {document.best.step}, validation loss {document.best.valid_loss:.4f} nats.",
        f"Largest rank {document.rank}{cut}; the written adapter's logits are within "
        f"{document.max_logit_deviation:.2g} of the trained model's.",
        *(f"{_label(name)}: {value:.4g}." for name, value in document.figures.items()),
        *_options(document),
        *_sweep(document),
    ]


def _label(figure: str) -> str:
    return FIGURES.get(figure, figure.replace("_", " ").capitalize())


def _options(document: TuneDocument) -> list[str]:
    """How a LoRA was trained, where that is not as usual."""
    if find_tuning_method(document.method).mixes:
        return []
    facts = []
    for option in chosen_options(document.settings):
        if option.name != AXES[option.axis]:
            own = [f"{name} {document.settings[name]}" for name in option.defaults]
            told = ", ".join([option.paper, *own])
            facts.append(f"{option.axis.capitalize()} {option.name}: {option.summary} ({told}).")
    return facts


def _sweep(document: TuneDocument) -> list[str]:
    sweep = document.sweep
    if sweep is None:
        return []
    chosen = " and ".join(f"{name} {value:.3g}" for name, value in sweep.chosen.items())
    out = sum(trial.valid_loss is None for trial in sweep.trials)
    diverged = f", of which {out} diverged" if out else ""
    return [
        f"Found by successive halving on the validation rows: {chosen}, in {len(sweep.trials)} "
        f"short trainings{diverged}, {sweep.steps} steps in all, {sweep.elapsed_s:.0f} s."
    ]
