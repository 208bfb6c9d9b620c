"""`recycle tune --dry-run`: how much memory a tuning would take."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.evaluation.tasks import training_split
from recycle_cli.records import AdapterRef, BudgetDocument
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.output_folder import dtype_named
from recycle_cli.workflows.tune_job import (
    Job,
    build_tuned,
    lora_setup,
    mixture_plan,
)
from recycle_cli.workflows.tune_request import TARGET_FOLDER, TuneRequest, check_request

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.budget import Budget
    from recycle_cli.engine.search import SearchPlan
    from recycle_cli.engine.training import TrainingPlan


def budgets(
    request: TuneRequest, sources: Sequence[Source], target: Source | None, base: "BaseModel"
) -> list[BudgetDocument]:
    """The memory that `tune` would take with the same arguments, run by run; nothing is trained,
    and nothing is written to stay.

    Raises:
        InputError: as `tune`.
        RecycleError: the memory does not suffice.
    """
    from recycle_cli.engine.encoding import encode_examples
    from recycle_cli.lora.folder import weights_sha256

    check_request(request, sources, target)
    train, _ = training_split(request.task, request.seed, request.rows)
    rows = encode_examples(base, train)
    documents = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if request.train_target:
            first = Job(request.of_target(), (), None, rows, [], folder, request.state_folder)
            documents.append(_of_lora(first, base))
            ref = AdapterRef(id=TARGET_FOLDER, sha256=weights_sha256(folder), path=name)
            target = Source(ref, place=folder)
        job = Job(request, sources, target, rows, [], folder, request.state_folder)
        documents.append((_of_mixture if job.method.mixes else _of_lora)(job, base))
    return documents


def _of_mixture(job: Job, base: "BaseModel") -> BudgetDocument:
    from recycle_cli.tuning.tuned import tokens_a_pass

    tuned = build_tuned(job, base)
    plan, budget = mixture_plan(job, base, tuned)
    products = tuned.told(base, tokens_a_pass(job.train, plan))
    found = _Found(plan, budget, list(tuned.parameters()), tuned.held(), products)
    return _document(job, base, found, base.model.parameters())


def _of_lora(job: Job, base: "BaseModel") -> BudgetDocument:
    """The document; the LoRA, as it would start, is left in the job's folder."""
    from recycle_cli.lora.folder import write_adapter
    from recycle_cli.tuning.lora_form import form_budget, former_of

    own = list(base.model.parameters())
    setup = replace(lora_setup(job, base), only_measured=True)
    with former_of(job.settings)(setup) as form:
        budget = form_budget(setup, form, job.request.max_memory)
        trained = list(form.parameters.values())
        write_adapter(job.folder, form.update(), base.id, dtype_named("float32"))
        found = _Found(budget.fitted(setup.plan), budget, trained, [*trained, *form.held])
        return _document(job, base, found, own)


@dataclass(frozen=True)
class _Found:
    """What a document is made of: `held` are the tensors that lie beside the model's."""

    plan: "TrainingPlan | SearchPlan"
    budget: "Budget"
    trained: "Sequence[Tensor]"
    held: "Sequence[Tensor]"
    products: str = ""


def _document(
    job: Job, base: "BaseModel", found: _Found, of_model: "Iterable[Tensor]"
) -> BudgetDocument:
    from recycle_cli.engine.budget import tensor_bytes

    return BudgetDocument(
        method=job.request.method,
        base_model=job.request.base_model,
        device=str(base.compute.device),
        dtype=str(base.dtype).removeprefix("torch."),
        adapters=len(job.mixed),
        trained_numbers=sum(tensor.numel() for tensor in found.trained),
        model_bytes=tensor_bytes(of_model),
        adapters_bytes=tensor_bytes(found.held),
        training_bytes=found.budget.needed(found.plan.rows_a_pass),
        free_bytes=found.budget.free,
        batch_size=found.plan.batch_size,
        rows_a_pass=found.plan.rows_a_pass,
        gradient_checkpointing=job.request.checkpointing,
        products=found.products,
    )
