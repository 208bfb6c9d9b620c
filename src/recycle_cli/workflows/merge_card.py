"""What a merge's user should know: its warnings and its card."""

from collections.abc import Sequence
from pathlib import Path

from recycle_cli.merging.catalog import find_merge_method
from recycle_cli.records import MergeDocument
from recycle_cli.workflows.adapters import Source, counted
from recycle_cli.workflows.licenses import card_licenses, license_warnings
from recycle_cli.workflows.merge_request import WITH_RESIDUAL, MergeRequest
from recycle_cli.workflows.merge_results import MODEL, RESIDUAL_FOLDER, Outcome
from recycle_cli.workflows.model_card import Card, CardSource

LOW_ENERGY = 0.9
# Servers refuse larger ones: it is the largest --max-lora-rank that vLLM knows.
SERVED_RANK = 512


def merge_warnings(request: MergeRequest, sources: Sequence[Source], outcome: Outcome) -> list[str]:
    """What may surprise: licences, a lossy rank limit, one that limits nothing, a huge rank."""
    return [
        *license_warnings([source.license for source in sources]),
        *_about_energy(outcome),
        *_about_rank(request, outcome),
    ]


def _about_energy(outcome: Outcome) -> list[str]:
    low = [energy for energy in outcome.energy_by_module.values() if energy < LOW_ENERGY]
    if not low:
        return []
    return [
        f"The rank limit keeps {outcome.energy_kept:.1%} of the merged update's energy; "
        f"{len(low)} of {len(outcome.cuts)} modules keep less than {LOW_ENERGY:.0%}, the least "
        f"{min(low):.1%}."
    ]


def _about_rank(request: MergeRequest, outcome: Outcome) -> list[str]:
    largest = max(cut.rank for cut in outcome.cuts.values())
    if request.rank.isdecimal() and int(request.rank) > largest:
        return [
            f"--rank {int(request.rank)} is more than there is: no module has more than {largest}."
        ]
    if outcome.form != MODEL and outcome.rank > SERVED_RANK:
        return [
            f"The adapter has rank {outcome.rank}, more than servers take; --rank N lowers it, "
            "and --into-base needs none."
        ]
    return []


def merge_card(document: MergeDocument) -> Card:
    """The card of a merge."""
    method = find_merge_method(document.method)
    return Card(
        title=Path(document.path).name,
        summary=f"{counted(document.adapters)} merged by {method.name}: {method.summary} "
        f"({method.paper}).",
        base_model=document.base_model,
        sources=[
            CardSource(a.id, a.revision, a.sha256, a.weight, a.license) for a in document.adapters
        ],
        facts=_facts(document),
        command=" ".join(document.command),
        warnings=document.warnings,
        licenses=card_licenses([a.license for a in document.adapters]),
        model=document.form == MODEL,
        energies=document.energy_by_module,
    )


def _facts(document: MergeDocument) -> list[str]:
    shown = {"weights", "rank"}
    settings = [f"{name} {value}" for name, value in document.params.items() if name not in shown]
    facts = [
        f"Settings: {', '.join(settings)}; seed {document.seed}.",
        f"Largest rank {document.rank}; `--rank {document.params['rank']}` kept "
        f"{document.energy_kept:.4%} of the squared norm.",
    ]
    if document.form == WITH_RESIDUAL:
        facts.append(
            f"`{RESIDUAL_FOLDER}/` holds what this adapter lacks to the exact mean, as an adapter "
            "too: put both on the base model, or add it to the base's weights first (recycle merge "
            f"{RESIDUAL_FOLDER} --into-base). The rank limit and the energy above are its own."
        )
    if document.max_logit_deviation is not None:
        facts.append(
            f"Logits differ by at most {document.max_logit_deviation:.3g} from the base model's "
            "with the merge beside it."
        )
    return facts
