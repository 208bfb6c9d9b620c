"""Every way to select, through the real command on a pool of PEFT adapters."""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import write_peft_adapter
from support.command import RECYCLE, Recycle, assert_refused
from support.pico import MLP
from support.tasks import write_task

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import encode_examples
from recycle_cli.engine.gradients import weight_gradients
from recycle_cli.evaluation.tasks import load_task, training_split
from recycle_cli.lora.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from recycle_cli.selection.catalog import METHODS
from recycle_cli.selection.similarity import Target, similarity
from recycle_cli.store.answers import AnswerBook

NAMES = {"lab/plain", "lab/rslora", "shop/patterned", "shop/mlp"}


@pytest.fixture
def target(pico_folder: Path, tmp_path: Path) -> Path:
    return write_peft_adapter(tmp_path / "target", pico_folder, 77, target_modules=list(MLP))


@pytest.fixture
def base(pico_folder: Path) -> tuple[str, Path]:
    return ("--base-model", pico_folder)


def order(document: dict[str, Any]) -> list[str]:
    return [adapter["id"] for adapter in document["adapters"]]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_ranks_the_pool(
    crawled: Recycle, task: Path, target: Path, base: tuple[str, Path], name: str
) -> None:
    method = METHODS[name]
    words = ["--task", task] if method.needs_task else []
    words += ["--target", target] if method.needs == "target" else []
    line = ("select", "--method", name, "-k", 3, *words, *base, "--json")
    if name == "popularity":
        refused = crawled(*line, succeeds=False)
        assert_refused(refused, 1, "none of the 4 adapters", "nobody counted its downloads")
        return
    document = crawled(*line).document
    assert len(document["adapters"]) == 3
    assert set(order(document)) <= NAMES
    scores = [adapter["score"] for adapter in document["adapters"]]
    assert scores == sorted(scores, reverse=True)
    assert document["method"] == name
    assert (document["target"] is None) == (method.needs != "target")
    assert {adapter["role"] for adapter in document["adapters"]} == {"pool"}
    again = crawled(*line).document
    assert [a["score"] for a in again["adapters"]] == pytest.approx(scores)
    assert crawled(*document["command"][1:], "--json").document["adapters"] == again["adapters"]


def test_scores_of_a_target_are_those_of_the_updates(
    crawled: Recycle, target: Path, base: tuple[str, Path]
) -> None:
    for method, aggregate in (("cosine", "micro"), ("quasi-fim", "macro"), ("l2", "macro")):
        words = (
            ("--method", method, "--aggregate", aggregate) if method != "l2" else ("--method", "l2")
        )
        document = crawled("select", *words, "--target", target, *base, "--json").document
        for adapter in document["adapters"]:
            update, query = (
                read_adapter(Path(folder)).update for folder in (adapter["path"], target)
            )
            expected = similarity(update, Target(query), method, aggregate)  # type: ignore[arg-type]
            assert adapter["score"] == pytest.approx(expected)


def test_gradient_scores_are_dense_products_with_the_gradient(
    crawled: Recycle, task: Path, base: tuple[str, Path], pico_base: BaseModel
) -> None:
    line = ("select", "--task", task, *base, "--json", "--method")
    plain, normalised = (
        {a["id"]: a for a in crawled(*line, name).document["adapters"]}
        for name in ("gradient", "gradient-normalised")
    )
    train, _ = training_split(load_task(str(task)), 0, None)
    examples = encode_examples(pico_base, train)
    gradients = weight_gradients(pico_base, examples, list(pico_base.shapes))
    for name, adapter in plain.items():
        update = read_adapter(Path(adapter["path"])).update
        slope = sum(float((gradients[m] * p.dense()).sum()) for m, p in update.items())
        norm = sum(float(p.dense().square().sum()) for p in update.values()) ** 0.5
        assert adapter["score"] == pytest.approx(-slope, rel=1e-3, abs=1e-5)
        assert normalised[name]["score"] == pytest.approx(-slope / norm, rel=1e-3, abs=1e-5)


def test_one_pass_serves_the_whole_pool(
    crawled: Recycle, task: Path, base: tuple[str, Path]
) -> None:
    words = ("--task", task, *base, "--json")
    gradient = crawled("select", "--method", "gradient", *words).document["cost"]
    evaluation = crawled("select", *words).document["cost"]
    assert (gradient["passes"], gradient["rows_scored"]) == (1, 32)
    assert (evaluation["passes"], evaluation["rows_scored"]) == (4, 4 * 32)


# --- answers are kept ----------------------------------------------------------------------------


def test_no_answer_is_computed_twice(crawled: Recycle, task: Path, base: tuple[str, Path]) -> None:
    """Not for a larger k, not by another method, not for the rows that one more row joins."""
    words = ("select", "--task", task, *base, "--json")
    first = crawled(*words, "-k", 1).document
    assert first["cost"]["passes"] == 4
    more = crawled(*words, "-k", 4).document
    assert (more["cost"]["passes"], more["cost"]["rows_scored"]) == (0, 0)
    assert more["adapters"][0] == first["adapters"][0]
    halved = crawled(*words, "-k", 1, "--method", "halving").document
    assert halved["cost"]["passes"] == 0
    assert halved["cost"]["agreement"] in (0.0, 1.0)
    wider = crawled(*words, "--score-on", "all").document
    assert (wider["cost"]["passes"], wider["cost"]["rows_scored"]) == (4, 4 * 8)


def test_what_is_kept_is_what_a_fresh_run_finds(
    crawled: Recycle, task: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    words = ("select", "--task", task, *base, "--json")
    kept = [crawled(*words).document["adapters"] for _ in range(2)][1]
    (tmp_path / "home/catalog.sqlite").unlink()
    ids = [adapter["path"] for adapter in kept]
    fresh = crawled(*words[:1], *ids, *words[1:]).document["adapters"]
    assert [a["sha256"] for a in fresh] == [a["sha256"] for a in kept]
    for one, other in zip(fresh, kept, strict=True):
        assert one["score"] == other["score"]
        assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-5)


def test_an_interrupted_selection_goes_on_where_it_was(
    crawled: Recycle, pool: Path, task: Path, base: tuple[str, Path]
) -> None:
    """What was scored before it ended is what a selection of those adapters leaves behind."""
    words = ("--task", task, *base, "--json")
    crawled("select", pool / "lab/plain", pool / "shop/mlp", *words)
    whole = crawled("select", *words).document
    assert whole["cost"]["passes"] == 2
    assert len(whole["adapters"]) == 4


def test_a_killed_selection_computes_no_finished_score_again(
    recycle: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    pool, count = tmp_path / "many", 12
    for seed in range(count):
        write_peft_adapter(pool / f"{seed}", pico_folder, seed)
    large = write_task(tmp_path / "large", train=400)
    recycle("crawl", pool, "--base-model", pico_folder)
    line = ["select", "--task", str(large), "--base-model", str(pico_folder), "--json"]
    environment = {**os.environ, "RECYCLE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([*RECYCLE, *line], env=environment, stdout=subprocess.DEVNULL)
    file = tmp_path / "home/catalog.sqlite"
    finished = 0
    while process.poll() is None and finished < 2:
        with sqlite3.connect(file) as connection:
            (finished,) = connection.execute("SELECT count(*) FROM answers").fetchone()
        time.sleep(0.01)
    process.kill()
    process.wait()
    document = recycle(*line).document
    assert 0 < document["cost"]["passes"] <= count - finished
    assert len(document["adapters"]) == 10


def test_other_scaling_of_the_same_weights_is_another_adapter(
    crawled: Recycle, pool: Path, task: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    words = ("--task", task, *base, "--json")
    before = crawled("select", pool / "lab/plain", *words).document["adapters"][0]
    shutil.copytree(pool / "lab/plain", tmp_path / "louder")
    config = tmp_path / "louder/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    after = crawled("select", tmp_path / "louder", *words).document
    assert after["cost"]["passes"] == 1
    assert after["adapters"][0]["sha256"] == before["sha256"]
    assert after["adapters"][0]["log_likelihood"] != before["log_likelihood"]


def test_halving_says_what_it_saved_and_who_went_out(
    recycle: Recycle, pico_folder: Path, task: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    for seed in range(8):
        write_peft_adapter(tmp_path / f"many/{seed}", pico_folder, seed)
    recycle("crawl", "many", *base)
    words = ("select", "--task", task, *base, "-k", 2, "--json")
    halved = recycle(*words, "--method", "halving").document
    cost = halved["cost"]
    # 8 adapters on 8 of 32 rows, 4 on 8 more, 2 on the other 16.
    assert (cost["rows_scored"], cost["rows_of_full"]) == (8 * 8 + 4 * 8 + 2 * 16, 8 * 32)
    assert cost["agreement"] is None
    reasons = [left["reason"] for left in halved["left_out"]]
    assert reasons == ["it went out after 8 rows"] * 4 + ["it went out after 16 rows"] * 2
    full = recycle(*words).document
    assert full["cost"]["rows_scored"] == 8 * 32 - cost["rows_scored"]
    now = recycle(*words, "--method", "halving").document["cost"]
    assert now["rows_scored"] == 0
    shared = set(order(halved)) & set(order(full))
    assert now["agreement"] == len(shared) / 2


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("whom", [("--workers", 2), ("--ray", "local")], ids=["processes", "ray"])
def test_a_worker_that_is_killed_changes_nothing(
    crawled: Recycle,
    task: Path,
    base: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    whom: tuple[str, object],
) -> None:
    """The second of two, which has been given an adapter when the first has done one."""
    if whom[0] == "--ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    add, killed = AnswerBook.add, list[int]()

    def add_and_kill(book: AnswerBook, *words: Any) -> None:
        add(book, *words)
        if not killed:
            killed.append(kill_the_second_worker())

    monkeypatch.setattr(AnswerBook, "add", add_and_kill)
    words = ("--task", task, *base, "--json")
    found = crawled("select", *words, *whom).document
    assert killed
    assert (found["cost"]["passes"], found["left_out"]) == (4, [])
    # Alone, with no answer at hand.
    monkeypatch.setenv("RECYCLE_HOME", str(tmp_path / "other"))
    alone = crawled("select", *[a["path"] for a in found["adapters"]], *words).document
    for one, other in zip(found["adapters"], alone["adapters"], strict=True):
        assert (one["sha256"], one["score"]) == (other["sha256"], other["score"])
        assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-5)


def kill_the_second_worker() -> int:
    """Waits until there are two workers, and kills the younger one."""
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2:
        assert time.monotonic() < deadline
        children = psutil.Process().children(recursive=True)
        workers = [child for child in children if is_worker(child)]
        time.sleep(0.02)
    second = max(workers, key=psutil.Process.create_time)
    second.kill()
    return second.pid


def is_worker(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:  # it has gone
        return False
    return "spawn_main" in words or "ray::_Actor" in words


# --- the pool ------------------------------------------------------------------------------------


def test_the_target_lora_stands_first_and_is_marked(
    crawled: Recycle, task: Path, target: Path, base: tuple[str, Path]
) -> None:
    words = ("select", "--method", "random", "--target", target, "--include-target", *base)
    document = crawled(*words, "-k", 3, "--json").document
    assert [a["role"] for a in document["adapters"]] == ["target", "pool", "pool"]
    assert document["adapters"][0]["path"] == document["target"]["path"] == str(target)
    assert document["adapters"][0]["score"] is None


def test_tune_takes_the_marked_one_for_its_target(
    crawled: Recycle, task: Path, target: Path, base: tuple[str, Path]
) -> None:
    words = ("select", "--method", "random", "--target", target, "--include-target", *base)
    selected = crawled(*words, "-k", 3, "--json").stdout
    line = ("tune", "-", "--task", task, "--steps", 0, "--out", "mixed", "--json")
    document = crawled(*line, stdin=selected).document
    assert [a["role"] for a in document["adapters"]] == ["pool", "pool", "target"]
    assert document["target"]["path"] == str(target)


def test_the_filters_of_the_index(crawled: Recycle, base: tuple[str, Path]) -> None:
    words = ("select", "--method", "rank", *base, "--json")
    assert set(order(crawled(*words, "--target-module", "gate_proj").document)) == {"shop/mlp"}
    assert set(order(crawled(*words, "--min-rank", 8).document)) == {"lab/rslora"}
    assert set(order(crawled(*words, "--search", "shop").document)) == {
        "shop/mlp",
        "shop/patterned",
    }
    assert set(order(crawled(*words, "--source", "folder").document)) == NAMES
    for option, value in (("--license", "gpl"), ("--source", "hub")):
        refused = crawled(*words, option, value, succeeds=False)
        assert_refused(refused, 1, "the index holds no adapter", "that is asked for")
    assert_refused(crawled(*words, "--source", "disk", succeeds=False), 2, "use one of: hub")


def test_words_find_the_card_that_says_what_the_task_is(
    crawled: Recycle, pool: Path, task: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(pool, tmp_path / "described")
    card = tmp_path / "described/shop/mlp/README.md"
    card.write_text("---\nlicense: mit\n---\nTells the colour of an item: red, green or blue.\n")
    crawled("crawl", "described", *base)
    document = crawled("select", "--method", "card", "--task", task, *base, "--json").document
    assert order(document)[0] == "shop/mlp"
    assert document["adapters"][0]["score"] > 0 == document["adapters"][-1]["score"]
    assert document["cost"]["passes"] == 0


def test_it_explains(crawled: Recycle, task: Path, base: tuple[str, Path]) -> None:
    said = crawled("select", "--task", task, *base, "--explain").stdout
    assert "share of rows answered right" in said
    assert "4 passes of the model over 128 rows in all" in said
    assert "below the cut" not in said


def test_it_tells_who_is_below_the_cut_and_who_ties_there(
    crawled: Recycle, base: tuple[str, Path]
) -> None:
    """Ranks are 8, 4, 4 and 2."""
    words = ("select", "--method", "rank", *base, "-k", 2)
    whole = order(crawled(*words[:-1], 4, "--json").document)
    assert (whole[0], whole[3]) == ("lab/rslora", "shop/mlp")
    taken, below = crawled(*words, "--explain").stdout.split("below the cut, the first of 2")
    assert [name in taken for name in whole] == [True, True, False, False]
    assert below.index(whole[2]) < below.index(whole[3])
    assert "2 adapters share the last score that was taken; 1 of them did not come in" in below
    assert "below the cut" not in crawled(*words).stdout


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("card", "popularity")])
def test_what_cannot_be_used_is_left_out_alone(
    recycle: Recycle,
    pico_folder: Path,
    task: Path,
    target: Path,
    base: tuple[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    folders = [write_peft_adapter(tmp_path / f"{at}", pico_folder, at) for at in range(5)]
    holds_nan, is_dora, is_cut = folders[1:4]
    weights = load_file(holds_nan / WEIGHTS_FILE)
    next(reversed(weights.values()))[0, 0] = math.nan
    save_file(weights, holds_nan / WEIGHTS_FILE)
    config = json.loads((is_dora / CONFIG_FILE).read_text())
    (is_dora / CONFIG_FILE).write_text(json.dumps({**config, "use_dora": True}))
    (is_cut / WEIGHTS_FILE).write_bytes((is_cut / WEIGHTS_FILE).read_bytes()[:-9])

    method = METHODS[name]
    words = ["--task", task] if method.needs_task else []
    words += ["--target", target] if method.needs == "target" else []
    line = ("select", *folders, "--method", name, "-k", 1, *words, *base, "--json")
    document = recycle(*line).document
    said = {left["id"]: left["reason"] for left in document["left_out"]}
    assert "DoRA" in said.pop("2")
    assert "cannot be read" in said.pop("3")
    if name not in ("rank", "random"):  # which look at no number
        assert "NaN" in said.pop("1")
    assert order(document)[0] in ("0", "1", "4")
    assert all(reason.startswith("it went out") for reason in said.values())


def test_an_adapter_of_other_shapes_than_the_target_is_left_out(
    recycle: Recycle, pico_folder: Path, target: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    good = write_peft_adapter(tmp_path / "good", pico_folder, 1, target_modules=list(MLP))
    wide = write_peft_adapter(tmp_path / "wide", pico_folder, 2, target_modules=list(MLP))
    weights = load_file(wide / WEIGHTS_FILE)
    key = next(key for key in weights if "up_proj.lora_B" in key)
    save_file({**weights, key: torch.ones(99, 4)}, wide / WEIGHTS_FILE)
    words = ("--target", target, *base, "--json")
    document = recycle("select", good, wide, "--method", "cosine", *words).document
    assert order(document) == ["good"]
    (left,) = document["left_out"]
    assert left["reason"].endswith("up_proj has another shape in the target LoRA")


def test_the_index_says_nothing_of_an_adapter_that_is_not_in_it(
    crawled: Recycle, pico_folder: Path, task: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    stranger = write_peft_adapter(tmp_path / "stranger", pico_folder, 50)
    words = ("--method", "card", "--task", task, *base, "--json")
    document = crawled("select", stranger, "lab/plain", *words).document
    assert order(document) == ["lab/plain"]
    assert document["left_out"] == [{"id": "stranger", "reason": "it is not in the index"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--method cosine", ("--method cosine compares with a target LoRA", "--target")),
        ("--method random --include-target", ("--include-target puts", "--target")),
        ("--method random --target TARGET", ("--target has no effect with --method random",)),
        ("--method cosine --target TARGET --aggregate mean", ("--aggregate is 'mean'", "micro")),
        ("--method l2 --target TARGET --aggregate micro", ("--aggregate has no effect", "cosine")),
        ("--method gradient", ("no task is named",)),
        ("--method card", ("no task is named",)),
        ("--method cosine --target TARGET --rows 20", ("scores no rows",)),
        ("--method random --workers 2", ("--workers has no effect with --method random",)),
        ("--method gradient --task TASK --ray auto", ("--ray has no effect",)),
        ("--task TASK --workers 2 --ray auto", ("--workers and --ray both",)),
        ("TARGET --method random --license mit", ("--license is about the index",)),
        ("--method random --explain --json", ("--explain is for people",)),
        ("--method cosine --target nowhere", ("'nowhere'",)),
    ],
)
def test_what_makes_no_sense_is_refused(
    crawled: Recycle,
    task: Path,
    target: Path,
    base: tuple[str, Path],
    line: str,
    said: tuple[str, ...],
) -> None:
    words = line.replace("TARGET", str(target)).replace("TASK", str(task)).split()
    assert_refused(crawled("select", *words, *base, succeeds=False), 2, *said)
