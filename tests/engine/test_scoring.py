import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from support import plain
from support.pico import write_model
from support.plain import CLOSED_ROWS, OPEN_ROWS, mixed_updates

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Question, encode_prompts, encode_questions, prompt_text
from recycle_cli.engine.scoring import candidate_log_likelihoods, greedy_answers
from recycle_cli.evaluation.lm_eval_task import lm_eval_config, run_lm_eval
from recycle_cli.evaluation.tasks import Row
from recycle_cli.settings import Settings

SIZES = [1, 2, 4, 32]
END, PAD = 2, 0


class Counting:
    """A progress that counts."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, note: str = "") -> None:
        self.steps += 1

    def stage(self, title: str, total: int | None = None) -> None: ...

    def message(self, text: str) -> None: ...

    def detail(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def base_without_chat(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = write_model(tmp_path_factory.mktemp("plain"), chat=False)
    return load_base_model(str(folder), Settings(folder, True, "float32", "cpu"))


@pytest.fixture(scope="module")
def ending_base(pico_base: BaseModel) -> BaseModel:
    """One that ends some of its answers early, and none at the first token alone."""
    model = copy.deepcopy(pico_base.model)
    model.lm_head.weight[END] *= 2.5
    return dataclasses.replace(pico_base, model=model)


@torch.no_grad()
def expected_scores(base: BaseModel, questions: Sequence[Question]) -> list[list[float]]:
    return [
        [
            float(plain.log_likelihood(base.model, question.prompt, [*question.lead, *candidate]))
            for candidate in question.candidates
        ]
        for question in questions
    ]


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [CLOSED_ROWS, CLOSED_ROWS[1:3], CLOSED_ROWS[3:4], OPEN_ROWS])
def test_candidates_score_as_in_a_pass_of_their_own(
    pico_base: BaseModel, rows: list[Row], size: int
) -> None:
    questions = encode_questions(pico_base, rows)
    progress = Counting()
    found = candidate_log_likelihoods(pico_base, questions, progress, size)
    assert_close(found, expected_scores(pico_base, questions))
    assert progress.steps == -(-len(rows) // size)


def test_leads_of_all_lengths_and_candidates_of_one_token(pico_base: BaseModel) -> None:
    questions = [
        Question((1, 5, 9), (), ((7,), (8, 9), (7,))),
        Question((1, 5), (20, 21, 22, 23, 24, 25), ((7, 7), (8,))),
        Question((1, 5, 9, 9, 9, 9, 9, 9), (30,), ((4, 5, 6, 7, 8, 9, 10),)),
        Question((77,), (31, 32), ((4,),)),
    ]
    for part in (questions, questions[:2], questions[3:]):
        found = candidate_log_likelihoods(pico_base, part, batch_size=3)
        assert_close(found, expected_scores(pico_base, part))


def test_with_an_adapter_on(pico_base: BaseModel) -> None:
    questions = encode_questions(pico_base, CLOSED_ROWS)
    before = candidate_log_likelihoods(pico_base, questions)
    with with_adapter(pico_base, mixed_updates(pico_base)[0]):
        found = candidate_log_likelihoods(pico_base, questions, batch_size=4)
        assert_close(found, expected_scores(pico_base, questions))
    assert max(abs(a - b) for a, b in zip(found[0], before[0], strict=True)) > 0.1
    assert candidate_log_likelihoods(pico_base, questions) == before


@pytest.mark.parametrize("kind", ["chat", "no chat", "prompts end in white space"])
def test_log_likelihoods_are_those_of_lm_eval(
    pico_base: BaseModel, base_without_chat: BaseModel, kind: str
) -> None:
    base = pico_base if kind == "chat" else base_without_chat
    tail = " \n\n" if kind == "prompts end in white space" else ""
    rows = [Row(row.input + tail, row.output, row.choices) for row in CLOSED_ROWS]
    found = candidate_log_likelihoods(base, encode_questions(base, rows), batch_size=4)

    space = "" if base is pico_base else " "
    spaced = [
        Row(row.input, space + row.output, tuple(space + choice for choice in row.choices))
        for row in rows
    ]
    prompts = [prompt_text(base, row.input) for row in rows]
    result = run_lm_eval(
        base.model, base.tokenizer, lm_eval_config("closed", prompts, spaced, "acc")
    )
    assert_close(found, [list(sample.log_likelihoods) for sample in result.samples])


def generated(
    base: BaseModel, prompt: Sequence[int], length: int, ends: int | list[int]
) -> list[int]:
    tokens = torch.tensor([list(prompt)])
    out = base.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=ends,
        pad_token_id=PAD,
    )
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 2, 12])
def test_answers_are_those_of_generate(ending_base: BaseModel, length: int, size: int) -> None:
    prompts = encode_prompts(ending_base, OPEN_ROWS)
    progress = Counting()
    found = greedy_answers(ending_base, prompts, length, progress, size)
    answers = [generated(ending_base, prompt, length, END) for prompt in prompts]
    assert found == [ending_base.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    assert progress.steps == -(-len(prompts) // size)
    if length == 12:
        # Some answers end by themselves and others at the limit.
        ended = [END in answer for answer in answers]
        assert 0 < sum(ended) < len(ended)


def test_an_answer_ends_at_the_end_of_turn_and_at_the_end_of_text(ending_base: BaseModel) -> None:
    prompts = encode_prompts(ending_base, OPEN_ROWS)
    free = [generated(ending_base, prompt, 12, END) for prompt in prompts]
    # A token that comes up within an answer that does not end by itself.
    end_of_text = next(answer[3] for answer in free if END not in answer)
    tokenizer = copy.deepcopy(ending_base.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_text)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    base = dataclasses.replace(ending_base, tokenizer=tokenizer)
    answers = [generated(base, prompt, 12, [end_of_text, END]) for prompt in prompts]
    assert {END, end_of_text} <= {answer[-1] for answer in answers}
    texts = [
        tokenizer.decode([token for token in answer if token not in (END, end_of_text)])
        for answer in answers
    ]
    assert greedy_answers(base, prompts, 12) == texts
