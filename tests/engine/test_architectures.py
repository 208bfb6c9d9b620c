"""The engine knows nothing of Llama: heads that scale or cap, positions that are learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import plain
from support.pico import make_tokenizer
from support.plain import CLOSED_ROWS

from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import encode_examples, encode_prompts, encode_questions
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.gradients import weight_gradients
from recycle_cli.engine.scoring import candidate_log_likelihoods, greedy_answers
from recycle_cli.errors import InputError
from recycle_cli.settings import Settings

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    **SPECIAL,
}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **SPECIAL}
KINDS: dict[str, dict[str, Any]] = {
    "Cohere": {**USUAL, "logit_scale": 0.25},
    "Granite": {**USUAL, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "Gemma2": {**USUAL, "head_dim": 8, "final_logit_softcapping": 1.0},
    "GPT2": {**SMALL_GPT2, "initializer_range": 0.15},
    # These reckon with how far apart tokens stand, whatever their positions are said to be.
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, **SPECIAL},
}
WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {**USUAL, "sliding_window": 16},
    "Gemma2": {**USUAL, "head_dim": 8, "sliding_window": 16},
}


def make_base(folder: Path, kind: str, config: dict[str, Any]) -> BaseModel:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    settings: Any = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **config)
    build: Any = transformers.AutoModelForCausalLM
    build.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base_model(str(folder), Settings(folder, True, "float32", "cpu"))


@torch.no_grad()
def check(base: BaseModel) -> None:
    examples = encode_examples(base, CLOSED_ROWS)
    loss = float(answer_loss(base, collate(base, examples)))
    assert loss == pytest.approx(float(plain.loss(base.model, examples)), abs=5e-6)

    questions = encode_questions(base, CLOSED_ROWS)
    for question, scores in zip(
        questions, candidate_log_likelihoods(base, questions, batch_size=4), strict=True
    ):
        for candidate, score in zip(question.candidates, scores, strict=True):
            answer = [*question.lead, *candidate]
            expected = float(plain.log_likelihood(base.model, question.prompt, answer))
            assert score == pytest.approx(expected, abs=1e-4)

    prompts = encode_prompts(base, CLOSED_ROWS)
    for prompt, text in zip(prompts, greedy_answers(base, prompts, 4), strict=True):
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(plain.logits(base.model, tokens)[-1].argmax()))
        assert 2 not in tokens[len(prompt) :]
        assert text == base.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_computes_what_the_model_computes(tmp_path: Path, kind: str) -> None:
    check(make_base(tmp_path, kind, KINDS[kind]))


@pytest.mark.parametrize("kind", list(WINDOWED))
def test_rows_longer_than_the_attention_window(tmp_path: Path, kind: str) -> None:
    """Refusing them would do, too: what must not be is other numbers."""
    try:
        check(make_base(tmp_path, kind, WINDOWED[kind]))
    except InputError as error:
        assert "window" in error.message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "GPT2"])  # nothing linear
def test_gradients_are_those_of_plain_rows(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path, kind, KINDS[kind])
    examples = encode_examples(base, CLOSED_ROWS)
    paths = [path for path in base.shapes if path != "lm_head"][-3:]
    found = weight_gradients(base, examples, paths)
    weights = [base.model.get_submodule(path).weight.requires_grad_() for path in paths]
    expected = torch.autograd.grad(plain.loss(base.model, examples), weights)
    for path, gradient in zip(paths, expected, strict=True):
        torch.testing.assert_close(found[path], gradient, rtol=1e-3, atol=1e-6)


def test_layers_that_are_no_attention_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, "Mamba", {"hidden_size": 32, "num_hidden_layers": 2, **SPECIAL})
    with pytest.raises(InputError, match="layers that are no attention"):
        candidate_log_likelihoods(base, encode_questions(base, CLOSED_ROWS))


def test_a_head_that_does_something_else_is_refused(tmp_path: Path) -> None:
    config = {**USUAL, "logits_scaling": 3.0, "head_dim": 8}
    with pytest.raises(InputError, match="does not compute its logits from its last hidden state"):
        make_base(tmp_path, "HyperCLOVAX", config)
