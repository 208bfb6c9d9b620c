import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plain
from support.plain import CLOSED_ROWS, mixed_updates, weighted_sum

from recycle_cli.engine.adapted import concatenate, replaced, shapes_of
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples, shared_length
from recycle_cli.engine.forward import (
    LENGTH_STEP,
    answer_logits,
    answer_loss,
    by_length,
    collate,
    mean_loss,
)
from recycle_cli.engine.products import FORMS, attached, trained_product


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def test_the_rows_have_something_to_share(examples: list[Example]) -> None:
    """Else the tests below would prove little."""
    assert shared_length([example.prompt for example in examples]) == 6
    assert shared_length([example.prompt for example in examples[1:3]]) > 60
    assert len({len(example.prompt) + len(example.answer) for example in examples}) > 4


@pytest.mark.parametrize("shared", [None, 0, 1, 5])
@pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(3, 4)])
def test_the_loss_is_the_plain_one(
    pico_base: BaseModel, examples: list[Example], part: slice, shared: int | None
) -> None:
    batch = collate(pico_base, examples[part], shared)
    expected = float(plain.loss(pico_base.model, examples[part]))
    assert float(answer_loss(pico_base, batch)) == pytest.approx(expected, abs=2e-6)


def test_logits_stand_where_answers_are_predicted(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    expected = torch.cat(
        [
            plain.logits(pico_base.model, [*e.prompt, *e.answer])[len(e.prompt) - 1 : -1]
            for e in examples
        ]
    )
    found = answer_logits(pico_base, collate(pico_base, examples))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 99])
def test_the_mean_loss_weighs_tokens_not_batches(
    pico_base: BaseModel, examples: list[Example], size: int
) -> None:
    batches = [collate(pico_base, examples[at : at + size]) for at in range(0, 6, size)]
    expected = float(plain.loss(pico_base.model, examples))
    assert mean_loss(pico_base, batches) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("shared", [None, 0])
def test_gradients_are_the_plain_ones(
    pico_base: BaseModel, examples: list[Example], shared: int | None
) -> None:
    """Those of coefficients and of trained factors, through the shared beginning too."""
    updates = mixed_updates(pico_base)
    weights = torch.linspace(0.5, 1.5, 12).view(4, 3).requires_grad_()
    factors = [
        factor.requires_grad_()
        for update in updates
        for piece in update.values()
        for factor in (piece.A, piece.B)
    ]
    inputs = [weights, *factors]
    batch = examples[1:4]

    dense = plain.DenseModel(pico_base, weighted_sum(updates, weights))
    expected = torch.autograd.grad(plain.loss(dense, batch), inputs)

    components = concatenate(updates)
    gates = {
        path: (lambda row=row, owner=piece.owner: weights[row][owner])
        for row, (path, piece) in enumerate(components.items())
    }
    trained = {
        path: trained_product(piece.A, piece.B, gates[path]) for path, piece in components.items()
    }
    rows = collate(pico_base, batch, shared)
    with replaced(pico_base, trained, shapes_of(components)):
        found = torch.autograd.grad(answer_loss(pico_base, rows), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for form in FORMS:
        with attached(pico_base, components, gates, dict.fromkeys(components, form)):
            (of_weights,) = torch.autograd.grad(answer_loss(pico_base, rows), [weights])
        torch.testing.assert_close(of_weights, expected[0], rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8))
def test_groups_hold_every_index_once(lengths: list[int], size: int) -> None:
    groups = by_length(lengths, size)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths)
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    assert all(0 < len(group) <= size for group in groups)


@pytest.mark.parametrize("shared", [None, 0, 3])
def test_a_batch_holds_its_rows(
    pico_base: BaseModel, examples: list[Example], shared: int | None
) -> None:
    batch = collate(pico_base, examples, shared)
    length = batch.tokens.shape[1]
    longest = max(len(e.prompt) + len(e.answer) for e in examples) - len(batch.prefix)
    assert longest <= length < longest + LENGTH_STEP
    assert length % LENGTH_STEP == 0
    assert batch.attention.shape == (len(examples), len(batch.prefix) + length)
    for example, tokens, attention, predicts in zip(
        examples, batch.tokens, batch.attention, batch.predicts, strict=True
    ):
        count = len(example.prompt) + len(example.answer)
        assert attention.tolist() == [1] * count + [0] * (attention.numel() - count)
        whole = torch.cat([batch.prefix, tokens])
        assert tuple(whole[:count].tolist()) == example.prompt + example.answer
        assert set(whole[count:].tolist()) <= {pico_base.tokenizer.pad_token_id}
        assert tuple(tokens[1:][predicts[:-1]].tolist()) == example.answer
    assert batch.targets.tolist() == [token for e in examples for token in e.answer]
