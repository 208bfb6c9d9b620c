"""`recycle eval`: merged models, several tasks, lm-eval's tasks, metrics, leaks, gates."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.command import Recycle, Shell, assert_refused
from support.lm_eval_tasks import write_lm_eval_tasks
from support.tasks import closed_rows, write_rows, write_task

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_white_space
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.evaluation.tasks import load_task
from recycle_cli.lora.folder import write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_form import Setup, ordinary, train_form
from recycle_cli.tuning.target_lora import LoraRecipe

NAMES = ("lab/plain", "shop/mlp")


@pytest.fixture(scope="module")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import datasets  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)  # for a process of its own
        yield write_lm_eval_tasks(tmp_path_factory.mktemp("lm-eval") / "tasks")


@pytest.fixture
def words(pico_folder: Path, task: Path) -> tuple[object, ...]:
    return ("--task", task, "--base-model", pico_folder, "--json")


def of(documents: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (d for d in documents if d["adapter"] != "base" and d["adapter"]["id"] == name)
    return found


def test_a_merged_model_scores_as_the_adapter_that_is_in_it(
    crawled: Recycle, words: tuple[object, ...], pico_folder: Path, tmp_path: Path
) -> None:
    base = ("--base-model", pico_folder, "--json")
    made = crawled("merge", *NAMES, *base, "--into-base", pico_folder, "--out", "whole")
    crawled("merge", *NAMES, *base, "--out", "apart")
    documents = crawled("eval", "whole", "apart", *words, "--samples", "rows.jsonl").documents
    whole, apart = of(documents, "whole"), of(documents, "apart")
    assert [d["form"] for d in documents] == ["base", "adapter", "model"]
    assert whole["metrics"] == apart["metrics"]
    assert whole["adapter"]["sha256"] == made.document["sha256"]
    assert whole["paired"]["baseline"] == "base"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    scores = {
        name: [s["log_likelihoods"] for s in rows if s["adapter"] == name]
        for name in ("whole", "apart", "base")
    }
    assert scores["whole"] != scores["base"]
    for one, other in zip(scores["whole"], scores["apart"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    piped = crawled("eval", "-", *words, "--baseline", "whole", stdin=made.stdout).documents
    assert of(piped, "whole")["metrics"] == whole["metrics"]
    again = crawled("eval", "-", *words, stdin=json.dumps(of(piped, "whole"))).documents
    assert of(again, "whole")["metrics"] == whole["metrics"]


def test_several_tasks_have_a_mean_and_one_family_of_p_values(
    crawled: Recycle, words: tuple[object, ...], tmp_path: Path
) -> None:
    other = write_task(tmp_path / "shapes", test=30)
    documents = crawled("eval", *NAMES, *words, "--task", other).documents
    assert [d["task"]["name"] for d in documents] == ["colours"] * 3 + ["shapes"] * 3 + ["mean"] * 3
    tests = [d["paired"] for d in documents[:6] if d["paired"]]
    smallest = min(test["p_value"] for test in tests)
    assert min(t["adjusted_p_value"] for t in tests) == pytest.approx(min(1, 4 * smallest))
    for at in range(3):
        colours, shapes, mean = documents[at::3]
        values = [d["metrics"]["acc"] for d in (colours, shapes)]
        assert mean["metrics"] == {"acc": pytest.approx(sum(values) / 2)}
        assert mean["task"]["members"] == ["colours", "shapes"]
        assert mean["task"]["rows"] == 70
    assert documents[7]["paired"]["tasks"] == 2


def test_the_same_rows_do_not_count_twice(
    crawled: Recycle, words: tuple[object, ...], tmp_path: Path
) -> None:
    """Six copies of a task would pass for six tasks."""
    copy = write_task(tmp_path / "copy")
    done = crawled("eval", "lab/plain", *words, "--task", copy, succeeds=False)
    assert_refused(done, 2, f"{copy} are the same rows, which would count twice")


def test_the_recorded_command_draws_the_same(crawled: Recycle, words: tuple[object, ...]) -> None:
    (document, *_) = crawled("eval", "lab/plain", *words, "--rows", 5, "--seed", 3).documents
    assert document["command"][-2:] == ["--seed", "3"]


def test_metrics_of_a_task_of_ones_own(
    crawled: Recycle, words: tuple[object, ...], tmp_path: Path
) -> None:
    documents = crawled("eval", "lab/plain", *words, "--samples", "acc.jsonl").documents
    rows = [json.loads(line) for line in (tmp_path / "acc.jsonl").open()]
    for document in documents:
        metrics = document["metrics"]
        assert metrics["acc"] == metrics["acc_norm"]
        name = "base" if document["adapter"] == "base" else "lab/plain"
        own = [row for row in rows if row["adapter"] == name]
        summed = [
            max(zip(row["log_likelihoods"], ("red", "green", "blue"), strict=True))[1]
            for row in own
        ]
        right = [choice == row["output"] for choice, row in zip(summed, own, strict=True)]
        assert metrics["acc_sum"] == sum(right) / len(right)
        for row in own:
            place = ("red", "green", "blue").index(row["output"])
            assert row["answer_log_likelihood"] == row["log_likelihoods"][place]
    for metric in ("f1", "rouge_l", "exact_match", "perplexity"):
        line = ("eval", "lab/plain", *words, "--metric", metric, "--max-new-tokens", "4")
        document = crawled(*line, "--samples", f"{metric}.jsonl").documents[1]
        assert document["metrics"].keys() == {metric}
        assert document["paired"]["metric"] == metric
        low, high = document["interval"][metric]
        assert low <= document["metrics"][metric] <= high
        (row, *_) = (json.loads(text) for text in (tmp_path / f"{metric}.jsonl").open())
        assert row["answer_log_likelihood"] < 0
        assert (row["score"] is None) == (metric == "perplexity")
    assert document["higher_is_better"] == {"perplexity": False}
    assert document["metrics"]["perplexity"] > 1


def test_lm_evals_tasks_by_name(
    crawled: Recycle, pico_folder: Path, tiny_tasks: Path, tmp_path: Path
) -> None:
    line = ("eval", "lab/plain", "--base-model", pico_folder, "--include-path", tiny_tasks)
    line = (*line, "--task", "tiny_group", "--json")
    documents = crawled(*line, "--num-fewshot", "2", "--samples", "rows.jsonl").documents
    names = [(d["task"]["name"], d["task"]["kind"]) for d in documents[1::2]]
    assert names == [
        ("tiny_choice", "task"), ("tiny_f1", "task"), ("tiny_group", "group"), ("mean", "mean"),
    ]  # fmt: skip
    choice, f1, group, _ = documents[1::2]
    assert choice["task"]["origin"] == "lm-eval"
    assert choice["task"]["num_fewshot"] == 2
    assert choice["metrics"].keys() == choice["stderr"].keys() == {"acc", "acc_norm"}
    assert choice["metric"] == choice["paired"]["metric"] == "acc_norm"
    assert f1["metrics"].keys() == {"acc", "f1"}
    assert f1["interval"].keys() == {"acc"}, "F1 says nothing of a single row"
    assert group["task"]["members"] == ["tiny_choice", "tiny_f1"]
    assert group["paired"] is None
    assert choice["command"][-2:] == ["--num-fewshot", "2"]
    again = crawled(*choice["command"][1:], "--json").documents[1]
    assert again["metrics"] == choice["metrics"]
    rows = [json.loads(text) for text in (tmp_path / "rows.jsonl").open()]
    assert rows[0]["prediction"] in ("red", "green")
    assert rows[0]["input"].count("Which colour") == 3


def test_a_file_of_that_name_goes_before_a_task_of_lm_evals(
    recycle: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    write_task(tmp_path / "hellaswag", test=21)
    (document,) = recycle(
        "eval", "--task", "hellaswag", "--base-model", pico_folder, "--json"
    ).documents
    assert document["task"]["origin"] == "file"


def test_rows_that_were_trained_on_are_counted_and_named(
    recycle: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    rows = closed_rows(30)
    leaked = [{**row, "input": f"  {row['input'].upper()} \n"} for row in rows[:4]]
    write_rows(tmp_path / "leaky/train.jsonl", rows)
    write_rows(tmp_path / "leaky/test.jsonl", [*closed_rows(20, start=500), *leaked])
    line = ("eval", "--task", "leaky", "--base-model", pico_folder, "--json")
    refused = recycle(*line, succeeds=False)
    assert_refused(refused, 2, "4 of 24 test rows also stand in the training rows of leaky")
    for row in leaked[:3]:
        assert repr(row["input"]) in refused.stderr
    (document,) = recycle(*line, "--allow-overlap").documents
    assert "4 of 24 test rows" in document["warnings"][0]


def test_an_adapter_that_makes_the_white_space_before_answers_unlikely_is_told(
    crawled: Recycle,
    words: tuple[object, ...],
    task: Path,
    pico_base: BaseModel,
    tmp_path: Path,
) -> None:
    """The opposite of one that learned the line break at the end of the chat template."""
    rows = encode_white_space(pico_base, load_task(str(task)).train[:30])
    examples = [Example(row.prompt, row.candidates[0]) for row in rows]
    setup = Setup(pico_base, LoraRecipe(rank=4), TrainingPlan(steps=20, lr=0.01), examples)
    with ordinary(setup) as form:
        train_form(setup, form, examples, setup.plan, Silent())
        update = {path: replace(one, scale=-one.scale) for path, one in form.update().items()}
    (tmp_path / "terse").mkdir()
    write_adapter(tmp_path / "terse", update, pico_base.id)
    base, plain, terse = crawled("eval", NAMES[0], "terse", *words).documents
    assert not any("white space" in said for said in (*base["warnings"], *plain["warnings"]))
    (said,) = (one for one in terse["warnings"] if "white space before every answer" in one)
    assert "compare acc_sum" in said
    written = crawled("eval", "terse", *words, "--metric", "exact_match").documents[1]
    assert not any("white space" in said for said in written["warnings"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--task no_such_taks", ("'no_such_taks'", "no such file or folder")),
        ("--task nowhere.jsonl", ("no task at 'nowhere.jsonl'",)),
        ("--task tiny_missing --include-path TASKS", ("'no/such-data'", "not in this machine")),
        ("--task tiny_choice --include-path TASKS --metric f1", ("'f1'", "acc, acc_norm")),
        ("--task tiny_choice --include-path nowhere", ("--include-path is 'nowhere'",)),
        ("--task TASK --num-fewshot 2", ("--num-fewshot is for lm-eval's tasks",)),
        ("--task TASK --apply-chat-template", ("--apply-chat-template is for",)),
        ("--task TASK --fail-under perplexity=3", ("computed here: acc, acc_norm, acc_sum",)),
        ("--task TASK --fail-under acc=1.5", ("'acc=1.5'", "from 0 to 1")),
        ("--task TASK --require best", ("'best'", "better-than=base")),
        ("--task TASK --require better-than=none", ("'none'", "none of the adapters")),
        ("--task TASK --require better-than=target", ("'target'",)),
        ("--task TASK --require better-than=lab/plain", ("there is none", "one more")),
        ("--task TASK --require better-than=base --alpha 5", ("--alpha is 5",)),
    ],
)
def test_refusals(
    crawled: Recycle,
    pico_folder: Path,
    task: Path,
    tiny_tasks: Path,
    line: str,
    said: tuple[str, ...],
) -> None:
    places = {"TASKS": tiny_tasks, "TASK": task}
    words = [places.get(word, word) for word in line.split()]
    line_of = ("--offline", "eval", "lab/plain", "--base-model", pico_folder, *words)
    assert_refused(crawled(*line_of, succeeds=False), 2, *said)


@pytest.fixture
def taught(crawled: Recycle, task: Path, pico_folder: Path, tmp_path: Path) -> Path:
    """A task of 60 rows whose right answers are those that the adapter lab/plain gives."""
    rows = closed_rows(60, start=2000)
    write_rows(tmp_path / "probe/test.jsonl", rows)
    line = ("eval", "lab/plain", "--task", "probe", "--base-model", pico_folder, "--json")
    crawled(*line, "--samples", "probe.jsonl")
    said = [json.loads(text) for text in (tmp_path / "probe.jsonl").open()]
    answers = [one["prediction"] for one in said if one["adapter"] == "lab/plain"]
    for row, answer in zip(rows, answers, strict=True):
        row["output"] = answer
    write_rows(tmp_path / "taught/test.jsonl", rows)
    return tmp_path / "taught"


def test_gates_end_a_shell_pipe_with_their_code(
    shell: Shell, taught: Path, pico_folder: Path
) -> None:
    start = f"recycle eval lab/plain shop/mlp --task taught --base-model {pico_folder} --json"
    for words, code, said in (
        ("--fail-under acc=0 --require better-than=shop/mlp", 0, ""),
        ("--fail-under acc=0.999", 3, "error: shop/mlp has acc 0."),
        ("--require better-than=lab/plain", 3, "shop/mlp is not shown to be better than lab/plain"),
    ):
        done = shell(f"{start} {words} | tee documents.jsonl | wc -l")
        assert (done.exit_code, done.stdout.strip()) == (code, "3"), (words, done.stderr)
        assert said in done.stderr
        if code:
            assert done.stderr.splitlines()[-2].startswith("error: ")
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--require better-than=base", 3, "shop/mlp is not shown to be better than base: acc"),
        ("--require better-than=shop/mlp --alpha 1e-30", 3, "wants p below 1e-30"),
        ("--metric perplexity --fail-under perplexity=1e30", 0, ""),
        ("--metric perplexity --fail-under perplexity=1", 3, "above 1"),
        ("--fail-under acc_norm=0.999", 3, "acc_norm 0."),
    ],
)
def test_gates(
    crawled: Recycle, taught: Path, pico_folder: Path, words: str, code: int, said: str
) -> None:
    line = ("eval", "lab/plain", "shop/mlp", "--task", taught, "--base-model", pico_folder)
    done = crawled(*line, *words.split(), "--json", succeeds=not code)
    assert (done.exit_code, len(done.documents)) == (code, 3)
    assert said in done.stderr


def test_a_lower_perplexity_is_better(crawled: Recycle, taught: Path, pico_folder: Path) -> None:
    line = ("eval", *NAMES, "--task", taught, "--base-model", pico_folder, "--json")
    line = (*line, "--metric", "perplexity", "--baseline", "shop/mlp")
    documents = crawled(*line).documents
    paired = of(documents, "lab/plain")["paired"]
    better = "lab/plain" if paired["difference"] < 0 else "shop/mlp"
    worse = ({*NAMES} - {better}).pop()
    assert paired["p_value"] < 0.05
    asked = ("eval", *NAMES, "--task", taught, "--base-model", pico_folder, "--json")
    asked = (*asked, "--metric", "perplexity", "--require")
    assert crawled(*asked, f"better-than={worse}").exit_code == 0
    assert crawled(*asked, f"better-than={better}", succeeds=False).exit_code == 3


def test_too_few_rows_never_show_anything(
    crawled: Recycle, taught: Path, pico_folder: Path
) -> None:
    line = ("eval", "lab/plain", "--task", taught, "--base-model", pico_folder, "--rows", "19")
    refused = crawled(*line, "--require", "better-than=base", "--json", succeeds=False)
    assert refused.exit_code == 3
    assert "19 test rows are too few for a claim" in refused.stderr


def test_the_target_is_the_one_that_the_pipe_marks(
    crawled: Recycle, taught: Path, pico_folder: Path
) -> None:
    selection = crawled(
        "select", "--method", "random", "-k", "2", "--target", "lab/plain", "--include-target",
        "--base-model", pico_folder, "--json",
    )  # fmt: skip
    line = ("eval", "-", "--task", taught, "--require", "better-than=target", "--json")
    refused = crawled(*line, stdin=selection.stdout, succeeds=False)
    assert refused.exit_code == 3
    assert "is not shown to be better than lab/plain" in refused.stderr
