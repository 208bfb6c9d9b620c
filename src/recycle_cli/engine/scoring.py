"""What a model, with or without an adapter on it, answers: likelihoods and greedy text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Question, end_of_answer, shared_length
from recycle_cli.engine.forward import by_length
from recycle_cli.engine.packing import Branching, pack, run_packed, takes_packed
from recycle_cli.engine.prefix import pad_left, repeated, run_prefix
from recycle_cli.progress import Progress, Silent

BATCH = 32
HEAD_ROWS = 256
"""Positions whose logits, over the whole vocabulary, are in memory at once."""

Prediction = tuple[int, int]
"""A position in the flattened rectangle of a batch, and the token that it shall predict."""


@torch.no_grad()
def candidate_log_likelihoods(
    base: BaseModel,
    questions: Sequence[Question],
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> list[list[float]]:
    """The log-likelihood of every candidate answer, in nats, summed over its tokens.

    A prompt and all its candidates are run in one pass, in which each token of the prompt stands
    once, if the model takes such rows; what all prompts begin with is run once for all questions.

    Returns:
        For each question, one number for each candidate, in their order.

    Raises:
        InputError: a row with an answer is longer than the model can see at once.
    """
    progress = progress or Silent()
    if takes_packed(base):
        return _scores(base, questions, progress, batch_size)
    single = [replace(one, candidates=(answer,)) for one in questions for answer in one.candidates]
    found = iter(_scores(base, single, progress, batch_size))
    return [[next(found)[0] for _ in question.candidates] for question in questions]


def _scores(
    base: BaseModel, questions: Sequence[Question], progress: Progress, batch_size: int
) -> list[list[float]]:
    prefix = _Prefix(base, [question.prompt for question in questions])
    lengths = [len(question.prompt) + len(question.lead) for question in questions]
    scores: list[list[float]] = [[] for _ in questions]
    for group in by_length(lengths, batch_size):
        batch = [questions[index] for index in group]
        for index, row in zip(group, _score_batch(base, prefix, batch), strict=True):
            scores[index] = row
        progress.advance()
    return scores


class _Prefix:
    """The shared beginning of a set of prompts, run once."""

    def __init__(self, base: BaseModel, prompts: Sequence[Sequence[int]]) -> None:
        self.length = shared_length(prompts)
        tokens = torch.tensor(prompts[0][: self.length], dtype=torch.int64)
        self._base = base
        self.cache = run_prefix(base, tokens.to(base.compute.device))

    def run(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Any]:
        """Runs the rest of some of the prompts.

        Returns:
            The hidden states (rows, length, width), the attention mask, and the cache.
        """
        tokens, attention = pad_left(self._base, prompts, self.length)
        position = attention.cumsum(dim=1)[:, self.length :] - 1
        out = self._base.model.base_model(
            tokens,
            attention_mask=attention,
            position_ids=position.clamp(min=0),
            past_key_values=repeated(self.cache, len(prompts)),
            use_cache=True,
        )
        return out.last_hidden_state, attention, out.past_key_values


def _score_batch(base: BaseModel, prefix: _Prefix, batch: Sequence[Question]) -> list[list[float]]:
    rows = [_branching(question, prefix.length) for question in batch]
    packed = pack(base, rows, prefix.length)
    hidden = run_packed(base, packed, prefix.cache)
    predictions = [
        one
        for question, row, start in zip(batch, rows, packed.starts, strict=True)
        for one in _predictions(question, row, start)
    ]
    flat = [pair for of_candidate in predictions for pair in of_candidate]
    found = _log_likelihoods(base, hidden, flat).split([len(one) for one in predictions])
    sums = iter([float(part.sum()) for part in found])
    return [[next(sums) for _ in question.candidates] for question in batch]


def _branching(question: Question, shared: int) -> Branching:
    """Nothing is predicted from an answer's last token, so that one is not run."""
    trunk = question.prompt[shared:] + question.lead
    return Branching(trunk, tuple(candidate[:-1] for candidate in question.candidates))


def _predictions(question: Question, row: Branching, start: int) -> list[list[Prediction]]:
    """Where each token of each candidate is predicted, those of the lead included."""
    last = start + len(row.trunk) - 1
    lead = list(zip(range(last - len(question.lead), last), question.lead, strict=True))
    found = []
    for candidate, offset in zip(question.candidates, row.branch_starts(), strict=True):
        begin = start + offset
        places = (last, *range(begin, begin + len(candidate) - 1))
        found.append([*lead, *zip(places, candidate, strict=True)])
    return found


def _log_likelihoods(base: BaseModel, hidden: Tensor, predictions: Sequence[Prediction]) -> Tensor:
    """The log-probability of each predicted token, float32 on the CPU."""
    places, tokens = torch.tensor(predictions, device=hidden.device).T
    # Candidates of a question share positions, whose logits are computed once.
    places, which = places.unique(return_inverse=True)
    found = torch.empty(len(predictions), device=hidden.device)
    for begin in range(0, len(places), HEAD_ROWS):
        logits = base.head(hidden[places[begin : begin + HEAD_ROWS]]).float()
        here = (which >= begin) & (which < begin + HEAD_ROWS)
        found[here] = logits.log_softmax(dim=-1)[which[here] - begin, tokens[here]]
    return found.cpu()


@torch.no_grad()
def greedy_answers(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> list[str]:
    """The text that the model writes for each prompt, taking the likeliest token every time.

    An answer ends at the model's end-of-turn token or after `max_new_tokens` tokens.

    Raises:
        InputError: a row with its answer is longer than the model can see at once.
    """
    progress = progress or Silent()
    prefix = _Prefix(base, prompts)
    texts = [""] * len(prompts)
    for group in by_length([len(prompt) for prompt in prompts], batch_size):
        ids = _generate(base, prefix, [prompts[index] for index in group], max_new_tokens)
        for index, answer in zip(group, ids, strict=True):
            texts[index] = base.tokenizer.decode(answer, skip_special_tokens=True)
        progress.advance()
    return texts


def _generate(
    base: BaseModel, prefix: _Prefix, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each answer, without the token that ended it."""
    ends = {int(base.tokenizer.eos_token_id), end_of_answer(base)}
    hidden, attention, cache = prefix.run(prompts)
    hidden = hidden[:, -1]
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        tokens = base.head(hidden).argmax(dim=-1)
        running -= {row for row in running if int(tokens[row]) in ends}
        for row in running:
            answers[row].append(int(tokens[row]))
        if not running:
            break
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
        base.check_length(attention.shape[1])
        out = base.model.base_model(
            tokens[:, None],
            attention_mask=attention,
            position_ids=attention.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        hidden, cache = out.last_hidden_state[:, -1], out.past_key_values
    return answers
