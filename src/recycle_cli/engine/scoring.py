"""What a model, with or without an adapter on it, answers: likelihoods and greedy text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Question, end_of_answer, shared_length
from recycle_cli.engine.forward import by_length
from recycle_cli.engine.prefix import pad_left, repeated, run_prefix
from recycle_cli.progress import Progress, Silent

BATCH = 32


@torch.no_grad()
def candidate_log_likelihoods(
    base: BaseModel,
    questions: Sequence[Question],
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> list[list[float]]:
    """The log-likelihood of every candidate answer, in nats, summed over its tokens.

    A prompt is run once and its keys and values serve all its candidates; the first token of
    every candidate comes from that same pass.

    Returns:
        For each question, one number for each candidate, in their order.

    Raises:
        InputError: a row with an answer is longer than the model can see at once.
    """
    progress = progress or Silent()
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
        self._cache = run_prefix(base, tokens.to(base.compute.device))

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
            past_key_values=repeated(self._cache, len(prompts)),
            use_cache=True,
        )
        return out.last_hidden_state, attention, out.past_key_values


def _score_batch(base: BaseModel, prefix: _Prefix, batch: Sequence[Question]) -> list[list[float]]:
    hidden, attention, cache = prefix.run([question.prompt + question.lead for question in batch])
    reach = max(len(question.lead) for question in batch) + 1
    ahead = _log_probabilities(base, hidden[:, -reach:])
    leads = [_lead_score(question.lead, row) for question, row in zip(batch, ahead, strict=True)]
    scores: list[list[float]] = [[] for _ in batch]
    for number in range(max(len(question.candidates) for question in batch)):
        answers = [
            question.candidates[number] if number < len(question.candidates) else ()
            for question in batch
        ]
        rest = _score_rest(base, answers, attention, cache)
        for row, answer in enumerate(answers):
            if answer:
                scores[row].append(leads[row] + float(ahead[row, -1, answer[0]]) + rest[row])
    return scores


def _lead_score(lead: Sequence[int], ahead: Tensor) -> float:
    """Log-likelihood of the tokens that all answers begin with.

    Args:
        lead: their ids.
        ahead: (positions, vocabulary) log-probabilities; the last but one row predicts the last
            token of the lead.
    """
    if not lead:
        return 0.0
    predicting = ahead[-1 - len(lead) : -1]
    targets = torch.tensor(lead, device=ahead.device)
    return float(predicting.gather(1, targets[:, None]).sum())


def _log_probabilities(base: BaseModel, hidden: Tensor) -> Tensor:
    """(..., vocabulary) in float32, from hidden states (..., width)."""
    logits = base.head(hidden.reshape(-1, hidden.shape[-1])).float()
    return logits.log_softmax(dim=-1).view(*hidden.shape[:-1], -1)


def _score_rest(
    base: BaseModel, answers: Sequence[Sequence[int]], attention: Tensor, cache: Any
) -> list[float]:
    """Log-likelihood of each answer's tokens after its first, given the cached prompts.

    The cache is as it was when this returns.
    """
    inputs = [tuple(answer[:-1]) for answer in answers]
    length = max(map(len, inputs))
    if length == 0:
        return [0.0] * len(answers)
    base.check_length(attention.shape[1] + length)
    tokens = torch.full((len(inputs), length), base.tokenizer.pad_token_id, dtype=torch.int64)
    present = torch.zeros(len(inputs), length, dtype=torch.int64)
    for row, ids in enumerate(inputs):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        present[row, : len(ids)] = 1
    device = attention.device
    tokens, present = tokens.to(device), present.to(device)
    out = base.model.base_model(
        tokens,
        attention_mask=torch.cat([attention, present], dim=1),
        position_ids=attention.sum(dim=1, keepdim=True) + torch.arange(length, device=device),
        past_key_values=cache,
        use_cache=True,
    )
    cache.crop(-length)
    log_probabilities = _log_probabilities(base, out.last_hidden_state[present.bool()])
    targets = torch.tensor([token for answer in answers for token in answer[1:]], device=device)
    picked = log_probabilities.gather(1, targets[:, None])[:, 0]
    return [float(part.sum()) for part in picked.split([len(ids) for ids in inputs])]


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
