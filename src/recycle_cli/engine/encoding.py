"""From rows of text to token ids, in the model's own chat form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recycle_cli.engine.base_model import BaseModel


class TextRow(Protocol):
    """What the engine needs of a task's row."""

    @property
    def input(self) -> str:
        """The prompt's text."""

    @property
    def output(self) -> str:
        """The right answer."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers to choose from; empty for an open question."""


@dataclass(frozen=True)
class Example:
    """A row to train on: the tokens that are scored as its answer, and the end-of-turn token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A row to score: candidate answers, without an end token.

    Args:
        prompt: the tokens before all answers.
        lead: the tokens that every answer begins with; they count in every score.
        candidates: the rest of each answer, at least one token.
    """

    prompt: tuple[int, ...]
    lead: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]


def prompt_text(base: BaseModel, text: str) -> str:
    """The text in the form the model was trained to answer: its chat template, where it has one."""
    if not base.tokenizer.chat_template:
        return text
    turn = [{"role": "user", "content": text}]
    rendered: str = base.tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    return rendered


def encode_examples(base: BaseModel, rows: Sequence[TextRow]) -> list[Example]:
    """Rows with their right answers, to train on.

    The answer begins where that of `encode_questions` does. White space that is scored but never
    trained on may become very unlikely, and a likelihood per character, which divides that by the
    lengths of the answers, would then favour the long ones.
    """
    end = end_of_answer(base)
    examples = []
    for row in rows:
        prompt, answer = _cut(base, prompt_text(base, row.input), row.output)
        examples.append(Example(prompt, (*answer, end)))
    return examples


def encode_questions(base: BaseModel, rows: Sequence[TextRow]) -> list[Question]:
    """Rows with their choices (or, for open rows, the right answer alone), to score.

    White space at the end of a prompt, such as a chat template's line break, is scored with the
    answer, as lm-eval does: both tools then score the same tokens.
    """
    return [_question(base, row) for row in rows]


def _question(base: BaseModel, row: TextRow) -> Question:
    prompt = prompt_text(base, row.input)
    pairs = [_cut(base, prompt, answer) for answer in row.choices or (row.output,)]
    answers = [answer for _, answer in pairs]
    shared = shared_length(answers)
    return Question(
        prompt=pairs[0][0],
        lead=answers[0][:shared],
        candidates=tuple(answer[shared:] for answer in answers),
    )


def encode_white_space(base: BaseModel, rows: Sequence[TextRow]) -> list[Question]:
    """The white space at the end of prompts, which is scored with every answer, as an answer of its
    own. Prompts without any are left out, and those whose white space makes a token with the
    answer."""
    found = []
    for row in rows:
        whole = prompt_text(base, row.input)
        prompt, answer = _cut(base, whole, row.output)
        white = _tokens(base, whole)[len(prompt) :]
        if white and answer[: len(white)] == white:
            found.append(Question(prompt, (), (white,)))
    return found


def encode_prompts(base: BaseModel, rows: Sequence[TextRow]) -> list[tuple[int, ...]]:
    """Rows without answers, to generate from."""
    return [_tokens(base, prompt_text(base, row.input)) for row in rows]


def end_of_answer(base: BaseModel) -> int:
    """The token that ends the model's own turn.

    Chat templates may end a turn with another token than the end of text, so it is read off a
    rendered conversation.
    """
    tokenizer = base.tokenizer
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        after = _tokens(base, rendered.rpartition("b")[2].strip())
        # Not all_special_ids, which leaves out special tokens that have no role of their own.
        added = tokenizer.added_tokens_decoder
        if after and after[0] in added and added[after[0]].special:
            return after[0]
    return int(tokenizer.eos_token_id)


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; every row keeps at least its last token."""
    shortest = min(map(len, rows))
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    same = 0
    while same < shortest - 1 and first[same] == last[same]:
        same += 1
    return same


def _spaced(base: BaseModel, answer: str) -> str:
    """The answer as it follows the prompt: without a chat template, after a space."""
    return answer if base.tokenizer.chat_template else " " + answer


def _cut(base: BaseModel, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the prompt without the white space at its end, and those of prompt and answer
    beyond that number.

    Both are tokenised as one text, since a token may reach over the border.
    """
    prompt_ids = _tokens(base, prompt.rstrip())
    return prompt_ids, _tokens(base, prompt + _spaced(base, answer))[len(prompt_ids) :]


def _tokens(base: BaseModel, text: str) -> tuple[int, ...]:
    encoding: Any = base.tokenizer(text, add_special_tokens=False)
    ids, beginning = tuple(encoding["input_ids"]), _beginning(base)
    return ids if ids[: len(beginning)] == beginning else (*beginning, *ids)


def _beginning(base: BaseModel) -> tuple[int, ...]:
    """The token that the tokenizer puts before a plain text, and that the model expects there, as
    Llama's does. A chat template writes such tokens itself."""
    if base.tokenizer.chat_template:
        return ()
    first = tuple(base.tokenizer("")["input_ids"][:1])
    return first if first == (base.tokenizer.bos_token_id,) else ()
