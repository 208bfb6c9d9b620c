import copy
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pico import CHAT_TEMPLATE, write_model

from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import (
    encode_examples,
    encode_prompts,
    encode_questions,
    encode_white_space,
    end_of_answer,
    prompt_text,
    shared_length,
)
from recycle_cli.evaluation.tasks import Row
from recycle_cli.settings import Settings

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
CHAT_FORM = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=["chat", "no chat", "no chat, begins"])
def base(
    request: pytest.FixtureRequest, pico_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> BaseModel:
    if request.param == "chat":
        return pico_base
    begins = request.param.endswith("begins")
    folder = write_model(tmp_path_factory.mktemp("plain"), chat=False, begins=begins)
    return load_base_model(str(folder), Settings(folder, True, "float32", "cpu"))


def has_chat(base: BaseModel) -> bool:
    return bool(base.tokenizer.chat_template)


def whole(base: BaseModel, text: str, answer: str) -> str:
    return CHAT_FORM.format(text) + answer if has_chat(base) else f"{text} {answer}"


def ids(base: BaseModel, text: str) -> list[int]:
    """Without a chat template, with what the tokenizer adds by itself."""
    return list(base.tokenizer.encode(text, add_special_tokens=not has_chat(base)))


@given(text=TEXT, answers=st.lists(TEXT, min_size=1, max_size=4, unique=True))
def test_tokens_are_those_of_the_whole_text(base: BaseModel, text: str, answers: list[str]) -> None:
    row = Row(text, answers[0], tuple(answers))
    [example], [question] = encode_examples(base, [row]), encode_questions(base, [row])
    [prompt] = encode_prompts(base, [row])
    wanted = ids(base, whole(base, text, answers[0]))
    assert [*example.prompt, *example.answer] == [*wanted, base.tokenizer.eos_token_id]
    assert prompt == tuple(ids(base, prompt_text(base, text)))
    # White space at the end of a prompt is trained on and scored with the answers, whose first
    # tokens may be scored together.
    assert example.prompt == question.prompt == tuple(ids(base, prompt_text(base, text).rstrip()))
    assert len(question.candidates) == len(answers)
    for answer, candidate in zip(answers, question.candidates, strict=True):
        assert candidate
        joined = [*question.prompt, *question.lead, *candidate]
        assert joined == ids(base, whole(base, text, answer))


@given(text=TEXT, end=st.sampled_from(["", " ", "\n", " \n\n", "\t"]), answer=TEXT)
def test_white_space_that_is_asked_for_is_scored(
    base: BaseModel, text: str, end: str, answer: str
) -> None:
    """As tokens of its own: where it makes one with the answer, it is left out."""
    row = Row(text + end, answer)
    scored = ids(base, whole(base, row.input, answer))
    for question in encode_white_space(base, [row]):
        joined = [*question.prompt, *question.candidates[0]]
        assert scored[: len(joined)] == joined
        assert len(question.prompt) < len(joined)
        assert not base.tokenizer.decode(list(question.candidates[0])).strip()


def test_open_rows_are_scored_on_the_right_answer(pico_base: BaseModel) -> None:
    [question] = encode_questions(pico_base, [Row("a?", "b")])
    [closed] = encode_questions(pico_base, [Row("a?", "b", ("b",))])
    assert question == closed
    assert (question.lead, question.candidates) == (
        tuple(ids(pico_base, "\n")),
        ((ids(pico_base, "b")[0],),),
    )


def test_a_text_begins_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path, chat=False, begins=True)
    base = load_base_model(str(folder), Settings(folder, True, "float32", "cpu"))
    bare, written = encode_prompts(base, [Row("a?", "b"), Row("<|im_start|>a?", "b")])
    assert bare == written == (base.tokenizer.bos_token_id, *base.tokenizer("a?").input_ids[1:])


def test_an_answer_ends_with_the_end_of_turn(base: BaseModel) -> None:
    assert end_of_answer(base) == base.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "end", "named"),
    [
        (CHAT_TEMPLATE, "<|im_end|>", True),
        (CHAT_TEMPLATE, "<|im_end|>", False),
        (CHAT_TEMPLATE.replace("<|im_end|>", "\n <|im_end|>"), "<|im_end|>", True),
        (CHAT_TEMPLATE.replace("<|im_end|>", ""), "<pad>", True),
        (CHAT_TEMPLATE.replace("<|im_end|>", " END"), "<pad>", True),
        (None, "<pad>", True),
    ],
)
def test_the_end_of_a_turn_need_not_be_the_end_of_text(
    pico_base: BaseModel, template: str | None, end: str, named: bool
) -> None:
    """Some tokenizers only mark the end of a turn as special in their vocabulary."""
    tokenizer = copy.deepcopy(pico_base.tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = template, "<pad>"
    if named:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    assert tokenizer.added_tokens_decoder[2].special
    base = dataclasses.replace(pico_base, tokenizer=tokenizer)
    assert end_of_answer(base) == tokenizer.convert_tokens_to_ids(end)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_shared_length_is_the_longest_that_leaves_every_row_a_token(
    rows: list[list[int]],
) -> None:
    found = shared_length(rows)
    fits = [
        length
        for length in range(7)
        if all(length < len(row) and row[:length] == rows[0][:length] for row in rows)
    ]
    assert found == max(fits)
