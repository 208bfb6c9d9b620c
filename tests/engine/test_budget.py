import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.plain import CLOSED_ROWS, mixed_updates
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import (
    Budget,
    check_room,
    estimate,
    free_memory,
    in_words,
    tensor_bytes,
)
from recycle_cli.engine.encoding import Example, encode_examples, shared_length
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.errors import RecycleError
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe

CPU = torch.device("cpu")
PLAN = TrainingPlan(steps=4, lr=0.1)
COUNTS = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def kept_by(base: BaseModel, rows: list[Example], shared: int) -> int:
    """Bytes that autograd holds after a forward pass, the weights apart, counted by another way:
    each saved tensor's own size, views of one storage once."""
    seen: dict[tuple[int, int], int] = {}
    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr(), 0] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = answer_loss(base, collate(base, rows, shared))
    del loss
    return sum(seen.values())


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_what_more_rows_keep_is_told_from_passes_of_one_and_two(
    pico_base: BaseModel, examples: list[Example], rows: int
) -> None:
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear", "one"), CPU)
    longest = max(examples, key=lambda e: len(e.prompt) + len(e.answer))
    with mixture.attached(pico_base):
        budget = estimate(pico_base, mixture.parameters(), examples, PLAN, held=mixture.held())
        shared = shared_length([e.prompt for e in examples])
        held = {t.untyped_storage().data_ptr() for t in mixture.held()}
        assert len(held) > len(list(mixture.parameters()))
        measured = kept_by(pico_base, [longest] * rows, shared) - tensor_bytes(mixture.held())
    logits = rows * len(longest.answer) * pico_base.model.config.vocab_size * 8
    told = budget.needed(rows) - budget.trained - logits
    assert told == pytest.approx(measured, rel=0.05)


def test_trained_numbers_count_with_gradient_moments_and_best(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear", "one"), CPU)
    with mixture.attached(pico_base):
        budget = estimate(pico_base, mixture.parameters(), examples, PLAN)
    assert budget.trained == 4 * 4 * sum(p.numel() for p in mixture.parameters())


def test_checkpointing_keeps_less(pico_base: BaseModel, examples: list[Example]) -> None:
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear", "one"), CPU)
    with mixture.attached(pico_base):
        whole, less = (
            estimate(pico_base, mixture.parameters(), examples, replace(PLAN, checkpointing=c))
            for c in (False, True)
        )
    assert less.needed(8) < 0.9 * whole.needed(8)


@given(COUNTS, COUNTS, st.integers(1, 10**9), COUNTS, st.integers(1, 64))
def test_a_plan_is_fitted_or_refused(
    trained: int, fixed: int, a_row: int, free: int, batch: int
) -> None:
    budget = Budget(trained, fixed, a_row, free)
    plan = replace(PLAN, batch_size=batch)
    if trained + fixed + a_row > free:
        with pytest.raises(RecycleError, match="beyond the model") as caught:
            budget.fitted(plan)
        assert "--gradient-checkpointing" in caught.value.hint
        return
    fitted = budget.fitted(plan)
    assert fitted.batch_size == batch
    assert 1 <= fitted.rows_a_pass <= batch
    assert budget.needed(fitted.rows_a_pass) <= free
    if fitted.rows_a_pass < batch:
        # The next larger size does not fit.
        assert budget.needed(min(batch, 2 * fitted.rows_a_pass)) > free
    else:
        assert fitted == plan


def test_what_is_free_is_some_but_not_all() -> None:
    total = int(re.findall(r"MemTotal:\s*(\d+)", open("/proc/meminfo").read())[0]) * 1024  # noqa: PTH123, SIM115
    assert 0 < free_memory(CPU) < total


def test_what_does_not_fit_is_refused_before_it_is_loaded() -> None:
    check_room(100, CPU, 100, "the adapters")
    with pytest.raises(RecycleError, match=r"the adapters take 2 GB, and 1\.5 GB"):
        check_room(2 * 10**9, CPU, 1_500_000_000, "the adapters")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1500, "1.5 kB"), (2 * 10**6, "2 MB"), (10**13, "10,000 GB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_words(count) == words
