"""lm-eval end to end on a tiny model, against log-likelihoods and answers computed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.errors import InputError
from recycle_cli.evaluation.lm_eval_task import NORMALISE_PATTERNS, lm_eval_config, run_lm_eval
from recycle_cli.evaluation.metrics import choose, exact_match
from recycle_cli.evaluation.tasks import Row

CONTEXT = 128
ANSWERS = ("yes", "no", "not at all", "(A)", "été", "12")
CLOSED = [
    Row(f"Question {number}: is {number * 7 % 11} odd?", choices[number % len(choices)], choices)
    for number in range(24)
    for choices in [ANSWERS[: 2 + number % 5]]
]
# Some prompts end in white space, which lm-eval scores with the answer.
PROMPTS = [f"<s>{row.input}{' ' if at % 3 else chr(10)}" for at, row in enumerate(CLOSED)]
PROMPTS[5] = f"<s>{CLOSED[5].input} {{{{ 7 * 7 }}}} Answer:"
PROMPTS[6] = "<s>7"


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    built: Any = LlamaForCausalLM(config)
    return built.float().eval()


def log_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """One pair, without batch or padding, the white space before the choice scored with it."""
    import torch

    context = tokenizer.encode(prompt.rstrip(), add_special_tokens=False)
    whole = tokenizer.encode(prompt + choice, add_special_tokens=False)
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(scores[at - 1, whole[at]]) for at in range(len(context), len(whole)))


def greedy(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """One token after the other, up to the end-of-sequence token."""
    import torch

    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    start = len(tokens)
    while len(tokens) < start + length:
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            tokens.pop()
            break
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def test_choices_agree_with_plain_torch(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    config = lm_eval_config("closed", PROMPTS, CLOSED, "acc")
    result = run_lm_eval(model, tokenizer, config, batch_size=5)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "%|" not in printed.err

    expected = [
        [log_likelihood(model, tokenizer, prompt, choice) for choice in row.choices]
        for prompt, row in zip(PROMPTS, CLOSED, strict=True)
    ]
    right = [
        row.choices[choose(values, row.choices)] == row.output
        for values, row in zip(expected, CLOSED, strict=True)
    ]
    assert 0 < sum(right) < len(right)
    # Were normalising never to matter here, agreeing on acc_norm would prove little.
    unnormalised = [
        row.choices[values.index(max(values))] == row.output
        for values, row in zip(expected, CLOSED, strict=True)
    ]
    assert right != unnormalised
    assert [sample.row for sample in result.samples] == list(range(len(CLOSED)))
    for sample, values in zip(result.samples, expected, strict=True):
        assert sample.log_likelihoods == pytest.approx(values, abs=1e-3)
        assert sample.text is None
    assert [bool(sample.scores["acc_norm"]) for sample in result.samples] == right
    assert [bool(sample.scores["acc"]) for sample in result.samples] == unnormalised
    assert result.metrics["acc_norm"] == pytest.approx(sum(right) / len(right))


def test_generated_answers_agree_with_plain_torch(model: Any, tokenizer: Any) -> None:
    prompts = PROMPTS[:8]
    texts = [greedy(model, tokenizer, prompt, length=6) for prompt in prompts]
    # Every other answer is what the model says, in another dress; the rest is not.
    outputs = [f"so #### {text.upper()} ." if at % 2 else "none" for at, text in enumerate(texts)]
    rows = [Row(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    right = [exact_match(text, output) for text, output in zip(texts, outputs, strict=True)]
    assert 0 < sum(right) < len(right)

    config = lm_eval_config("open", prompts, rows, "exact_match", max_new_tokens=6)
    result = run_lm_eval(model, tokenizer, config, batch_size=3)
    assert [sample.text for sample in result.samples] == texts
    assert [bool(sample.scores["exact_match"]) for sample in result.samples] == right
    assert all(sample.log_likelihoods == () for sample in result.samples)
    assert result.metrics == {"exact_match": pytest.approx(sum(right) / len(right))}


@pytest.mark.parametrize(("metric", "extra"), [("acc", len("no")), ("exact_match", 10)])
def test_a_row_that_does_not_fit_is_refused(
    model: Any, tokenizer: Any, metric: str, extra: int
) -> None:
    rows = [Row("x", "no", ("no", "a"))] * 2
    fits = "<s>" + "x" * (CONTEXT - 1 - extra)
    config = lm_eval_config("long", [fits, fits], rows, metric, max_new_tokens=10)
    run_lm_eval(model, tokenizer, config)
    config = lm_eval_config("long", [fits, fits + "x"], rows, metric, max_new_tokens=10)
    with pytest.raises(InputError, match=rf"^row 2 of the task takes {CONTEXT + 1} tokens .* 128$"):
        run_lm_eval(model, tokenizer, config)


def test_no_file_is_left_behind(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    run_lm_eval(model, tokenizer, lm_eval_config("t", PROMPTS[:2], CLOSED[:2], "acc"))
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.characters(exclude_characters="\0")), st.sampled_from(["", "4", "#### 4.", "É"]))
def test_lm_evals_normalising_is_ours(prediction: str, answer: str) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate  # type: ignore[import-untyped]

    for text in (prediction, f"{prediction}{answer}", f" {answer} .", f"{answer}\n. ."):
        theirs = exact_match_hf_evaluate(
            predictions=[text],
            references=[answer],
            regexes_to_ignore=NORMALISE_PATTERNS,
            ignore_case=True,
        )
        assert bool(theirs["exact_match"]) == exact_match(text, answer)


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="1 prompts for 2 rows"):
        lm_eval_config("t", ["a"], CLOSED[:2], "acc")
    with pytest.raises(ValueError, match="0 prompts for 0 rows"):
        lm_eval_config("t", [], [], "acc")
    with pytest.raises(ValueError, match="an empty prompt"):
        lm_eval_config("t", ["a", ""], CLOSED[:2], "acc")
    with pytest.raises(ValueError, match="'acc' needs choices in every row"):
        lm_eval_config("t", ["a"], [Row("a", "b")], "acc")
    with pytest.raises(InputError, match="unknown metric 'bleu'"):
        lm_eval_config("t", ["a"], CLOSED[:1], "bleu")
