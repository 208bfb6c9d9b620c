"""`recycle tune --dry-run`: how much memory a tuning would take."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from recycle_cli.evaluation.tasks import training_split
from recycle_cli.records import BudgetDocument
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.tune import Job, build_tuned, lora_recipe, mixture_plan, training_plan
from recycle_cli.workflows.tune_request import TuneRequest, check_request

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel


def budgets(
    request: TuneRequest, sources: Sequence[Source], target: Source | None, base: "BaseModel"
) -> list[BudgetDocument]:
    """The memory that `tune` would take with the same arguments, run by run; nothing is trained or
    written. A target LoRA that has yet to be trained is left out of the mixture.

    Raises:
        InputError: as `tune`.
        RecycleError: the memory does not suffice.
    """
    check_request(request, sources, target)
    return [
        (_of_mixture if job.method.mixes else _of_lora)(job, base)
        for job in _jobs(request, sources, target, base)
    ]


def _jobs(
    request: TuneRequest, sources: Sequence[Source], target: Source | None, base: "BaseModel"
) -> Iterator[Job]:
    from recycle_cli.engine.encoding import encode_examples

    train, _ = training_split(request.task, request.seed, request.rows)
    rows = encode_examples(base, train)
    if request.train_target:
        yield Job(request.of_target(), (), None, rows, [], request.out, request.state_folder)
    if sources or target or not request.train_target:
        yield Job(request, sources, target, rows, [], request.out, request.state_folder)


def _of_mixture(job: Job, base: "BaseModel") -> BudgetDocument:
    from recycle_cli.engine.budget import tensor_bytes
    from recycle_cli.tuning.tuned import tokens_a_pass

    tuned = build_tuned(job, base)
    plan, budget = mixture_plan(job, base, tuned)
    return BudgetDocument(
        method=job.request.method,
        base_model=job.request.base_model,
        device=str(base.compute.device),
        dtype=str(base.dtype).removeprefix("torch."),
        adapters=len(job.mixed),
        trained_numbers=sum(parameter.numel() for parameter in tuned.parameters()),
        model_bytes=tensor_bytes(base.model.parameters()),
        adapters_bytes=tensor_bytes(tuned.held()),
        training_bytes=budget.needed(plan.rows_a_pass),
        free_bytes=budget.free,
        batch_size=plan.batch_size,
        rows_a_pass=plan.rows_a_pass,
        gradient_checkpointing=job.request.checkpointing,
        products=tuned.told(base, tokens_a_pass(job.train, plan)),
    )


def _of_lora(job: Job, base: "BaseModel") -> BudgetDocument:
    from recycle_cli.engine.budget import tensor_bytes
    from recycle_cli.tuning.target_lora import lora_budget, target_lora

    model_bytes = tensor_bytes(base.model.parameters())
    with target_lora(base, lora_recipe(job), job.request.seed) as peft_model:
        budget = lora_budget(
            base, peft_model, job.train, training_plan(job), job.request.max_memory
        )
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        plan = budget.fitted(training_plan(job))
        return BudgetDocument(
            method=job.request.method,
            base_model=job.request.base_model,
            device=str(base.compute.device),
            dtype=str(base.dtype).removeprefix("torch."),
            adapters=0,
            trained_numbers=sum(parameter.numel() for parameter in trained),
            model_bytes=model_bytes,
            adapters_bytes=tensor_bytes(trained),
            training_bytes=budget.needed(plan.rows_a_pass),
            free_bytes=budget.free,
            batch_size=plan.batch_size,
            rows_a_pass=plan.rows_a_pass,
            gradient_checkpointing=job.request.checkpointing,
            products="",
        )
