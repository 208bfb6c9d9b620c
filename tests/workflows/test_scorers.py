"""What a worker makes of an adapter and rows; and what it says that its answers hang on."""

import dataclasses
from pathlib import Path

import pytest
from support.adapters import write_peft_adapter
from support.tasks import write_task

from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import Row, load_task
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.workflows import scorers
from recycle_cli.workflows.adapters import Source, resolve_names
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.scorers import AskContext, Job, Scorer, context_of, scoring_hands


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(tmp_path_factory.mktemp("home"), True, "float32", "cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, ...]:
    return load_task(str(write_task(tmp_path_factory.mktemp("task")))).train[:12]


@pytest.fixture
def scorer(pico_base: BaseModel, pico_folder: Path) -> Scorer:
    return Scorer(pico_base, str(pico_folder), "acc")


@pytest.fixture
def source(pico_folder: Path, home: Settings, tmp_path: Path) -> Source:
    return resolve_names([str(write_peft_adapter(tmp_path / "one", pico_folder, 1))], home)[0]


def test_answers_are_those_of_the_adapter_on_the_base(
    scorer: Scorer, source: Source, rows: tuple[Row, ...]
) -> None:
    found = scorer.work(Job(source, rows))
    update = source.load(scorer.base_model)
    expected = answer_rows(scorer.base, update, rows, "acc", Silent(), likelihoods=True)
    assert isinstance(found, list)
    assert [answer.correct for answer in found] == expected.correct
    assert [answer.log_likelihood for answer in found] == expected.log_likelihoods


def test_an_adapter_that_cannot_be_read_is_told_of_as_a_value(
    scorer: Scorer, source: Source, rows: tuple[Row, ...]
) -> None:
    config = Path(source.ref.path) / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    outcome = scorer.work(Job(source, rows))
    assert isinstance(outcome, RecycleError)
    assert "DoRA" in outcome.message


@pytest.mark.parametrize(
    "error", [RuntimeError("not enough memory: 8 TB\n at alloc.cpp"), MemoryError()]
)
def test_an_adapter_that_is_too_large_is_told_of_as_a_value(
    scorer: Scorer,
    source: Source,
    rows: tuple[Row, ...],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def run_out(*_args: object, **_words: object) -> None:
        raise error

    monkeypatch.setattr(scorers, "answer_rows", run_out)
    outcome = scorer.work(Job(source, rows))
    assert isinstance(outcome, RecycleError)
    assert outcome.message.startswith("it could not be run: ")
    assert "\n" not in outcome.message


def test_answers_hang_on_model_metric_and_dtype(
    scorer: Scorer, pico_folder: Path, home: Settings, tmp_path: Path
) -> None:
    coarse = load_base_model(str(pico_folder), dataclasses.replace(home, dtype="bfloat16"))
    others = [
        dataclasses.replace(scorer, metric="exact_match"),
        dataclasses.replace(scorer, base=coarse),
    ]
    contexts = {str(one.work(AskContext())) for one in [scorer, *others, scorer]}
    assert len(contexts) == 3


def test_a_worker_elsewhere_says_the_same(
    scorer: Scorer, pico_folder: Path, home: Settings
) -> None:
    with scoring_hands(None, str(pico_folder), "acc", home, workers=2) as hands:
        assert context_of(hands) == scorer.work(AskContext())
