"""The commands end to end: real files, a real model, real documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.command import POOL, Recycle
from support.folders import assert_same_update, dense_sum
from support.tasks import write_task

from recycle_cli.lora.folder import read_adapter
from recycle_cli.records import read_documents

FEW_STEPS = ("--steps", "3", "--eval-every", "2", "--batch-size", "4")


def test_crawl_reports_every_adapter_and_counts_them(
    recycle: Recycle, pool: Path, pico_folder: Path
) -> None:
    *adapters, summary = recycle("crawl", pool, "--base-model", pico_folder, "--json").documents
    assert {a["id"]: a["status"] for a in adapters} == {
        **dict.fromkeys(POOL, "accepted"),
        "lab/dora": "rejected",
    }
    assert summary["counts"] == {"accepted": 4, "rejected": 1}
    (dora,) = (a for a in adapters if a["id"] == "lab/dora")
    assert summary["reasons"] == {dora["reason"]: 1}
    assert "DoRA" in dora["detail"]
    for adapter in adapters:
        if adapter["status"] == "accepted":
            assert_same_update(Path(adapter["path"]), dense_sum({pool / adapter["id"]: 1.0}), 0)


def test_a_base_model_folder_is_one_however_it_is_spelled(
    recycle: Recycle, pool: Path, pico_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(pico_folder)
    recycle("crawl", pool / "lab/plain", "--base-model", "./model/")
    (row,) = recycle("index", "list", "--base-model", "model", "--json").documents
    assert row["base_model"] == str(pico_folder)
    words = ("select", "--method", "random", "--json", "--base-model")
    for spelling in (pico_folder, "model", tmp_path / "model"):
        assert len(recycle(*words, spelling).document["adapters"]) == 1


def test_a_licence_is_known_however_the_adapter_is_named(
    recycle: Recycle, pool: Path, pico_folder: Path
) -> None:
    merged = recycle(
        "merge", pool / "lab/plain", "--base-model", pico_folder, "--out", "merged", "--json"
    )
    again = recycle("merge", "-", "--out", "again", "--json", stdin=merged.stdout).document
    assert [adapter["license"] for adapter in again["adapters"]] == ["mit"]


def test_the_baseline_is_named_as_adapters_are(
    crawled: Recycle, pool: Path, pico_folder: Path, task: Path
) -> None:
    words = ("eval", "lab/plain", pool / "shop/mlp", "--task", task, "--base-model", pico_folder)
    digest = crawled("index", "show", "lab/plain", "--json").document["sha256"]
    for baseline, name in (
        ("lab/plain", "lab/plain"),
        (f"sha256:{digest[:8]}", "lab/plain"),
        (pool / "shop/mlp", "mlp"),
    ):
        documents = crawled(*words, "--baseline", baseline, "--json").documents
        assert {d["paired"]["baseline"] for d in documents if d["paired"]} == {name}


def test_index_answers_what_was_crawled(crawled: Recycle) -> None:
    assert crawled("index", "--json").document["adapters"] == 4
    listed = crawled("index", "list", "--json", "--sort", "-norm").documents
    norms = [row["norm"] for row in listed]
    assert len(listed) == 4
    assert norms == sorted(norms, reverse=True)
    (rslora,) = crawled("index", "list", "--json", "--min-rank", "5").documents
    assert rslora["id"] == "lab/rslora"
    assert rslora["use_rslora"] is True
    shown = crawled("index", "show", f"sha256:{rslora['sha256'][:8]}", "--json").document
    assert shown.items() >= rslora.items()
    assert {facts["rank"] for facts in shown["modules"].values()} == {8}
    stats = crawled("index", "stats", "--json").document
    assert (stats["adapters"], stats["counts"]["rejected"]) == (4, 1)
    for words in ((), ("list",), ("list", "--status", "all"), ("show", "lab/plain"), ("stats",)):
        assert "lab" in crawled("index", *words).stdout or words in ((), ("stats",))


def test_random_selection_needs_no_model_and_repeats_itself(
    crawled: Recycle, pico_folder: Path
) -> None:
    words = ("select", "--method", "random", "-k", "2", "--base-model", pico_folder, "--json")
    first, again, other = (
        [adapter["id"] for adapter in crawled(*words, "--seed", seed).document["adapters"]]
        for seed in (1, 1, 3)
    )
    assert first == again
    assert len(first) == 2
    assert first != other


def test_selection_scores_are_those_of_eval_on_the_same_rows(
    crawled: Recycle, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    selection = crawled(
        "select", "--task", task, "-k", "4", "--score-on", "all", "--base-model", pico_folder,
        "--json",
    ).document  # fmt: skip
    scores = {adapter["id"]: adapter["score"] for adapter in selection["adapters"]}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    rows_as_test = tmp_path / "same-rows"
    rows_as_test.mkdir()
    (rows_as_test / "test.jsonl").write_text((task / "train.jsonl").read_text())
    evaluated = crawled(
        "eval", *scores, "--task", rows_as_test, "--base-model", pico_folder, "--json"
    ).documents
    assert {d["adapter"]["id"]: d["metrics"]["acc"] for d in evaluated[1:]} == scores


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ((), dict.fromkeys(POOL, 0.25)),
        (
            ("--method", "linear", "--weights=1,-2,0.5,0"),
            dict(zip(POOL, (1, -2, 0.5, 0), strict=True)),
        ),
    ],
)
def test_merge_writes_the_weighted_sum(
    crawled: Recycle,
    pico_folder: Path,
    pool: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    weights: dict[str, float],
) -> None:
    document = crawled(
        "merge", *POOL, "--base-model", pico_folder, *words, "--out", "merged", "--json"
    ).document
    assert document["energy_kept"] == 1
    expected = dense_sum({pool / name: weight for name, weight in weights.items()})
    assert_same_update(tmp_path / "merged", expected, 1e-5)
    assert any("licence" in warning for warning in document["warnings"])
    card = (tmp_path / "merged/README.md").read_text()
    assert all(name in card for name in POOL)
    (recorded,) = read_documents((tmp_path / "merged/recycle.json").open())
    assert recorded.to_line() == (tmp_path / "merged/recycle.json").read_text().strip()


def test_merge_keeps_to_the_rank_asked_for(
    crawled: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    def merged(rank: str) -> dict[str, Any]:
        return crawled(
            "merge", *POOL, "--base-model", pico_folder, "--rank", rank, "--out", f"merged-{rank}",
            "--json",
        ).document  # fmt: skip

    two, most = merged("2"), merged("energy:0.8")
    assert two["rank"] == 2
    assert two["energy_kept"] < most["energy_kept"]
    assert most["energy_kept"] >= 0.8
    assert any("energy" in warning for warning in two["warnings"])


def test_tuning_without_adapters_trains_a_lora(
    recycle: Recycle, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    document = recycle(
        "tune", "--task", task, "--base-model", pico_folder, *FEW_STEPS, "--rank", "4", "--alpha",
        "8", "--rslora", "--rank-pattern", "v_proj=2", "--target-module", "q_proj",
        "--target-module", "v_proj", "--license", "mit", "--out", "target", "--json",
    ).document  # fmt: skip
    assert document["method"] == "lora"
    assert document["settings"]["use_rslora"] is True
    assert (document["task"]["train_rows"], document["task"]["valid_rows"]) == (32, 8)
    assert document["max_logit_deviation"] < 1e-4
    update = read_adapter(tmp_path / "target").update
    assert {path.rpartition(".")[2]: piece.rank for path, piece in update.items()} == {
        "q_proj": 4,
        "v_proj": 2,
    }
    assert "license: mit" in (tmp_path / "target/README.md").read_text()


@pytest.mark.parametrize("reinit", ["none", "experts", "all"])
def test_a_tuned_mixture_is_one_lora_that_scores_as_trained(
    crawled: Recycle, pico_folder: Path, task: Path, tmp_path: Path, reinit: str
) -> None:
    document = crawled(
        "tune", "lab/plain", "shop/mlp", "--target", "lab/rslora", "--reinit", reinit, "--task",
        task, "--base-model", pico_folder, *FEW_STEPS, "--out", "mixed", "--json",
    ).document  # fmt: skip
    assert [(a["id"], a["role"]) for a in document["adapters"]] == [
        ("lab/plain", "pool"),
        ("shop/mlp", "pool"),
        ("lab/rslora", "target"),
    ]
    assert document["max_logit_deviation"] < 1e-4
    assert document["settings"]["reinit"] == reinit
    assert document["best"]["valid_loss"] == min(loss for _, loss in document["history"])
    assert ("Control" in (tmp_path / "mixed/README.md").read_text()) == (reinit != "none")


def test_rescaling_starts_from_the_target_lora(
    crawled: Recycle, pico_folder: Path, task: Path, pool: Path, tmp_path: Path
) -> None:
    words = ("--task", task, "--base-model", pico_folder, "--out", "same", "--json")
    document = crawled(
        "tune", "--method", "rescale", "--target", "lab/plain", *FEW_STEPS, "--lr", "1e-12", *words
    ).document
    assert document["adapters"][0]["coefficient_mean"] == pytest.approx(1)
    assert_same_update(tmp_path / "same", dense_sum({pool / "lab/plain": 1.0}), 1e-5)


@pytest.mark.parametrize(
    "words",
    [
        "--method adamerging",
        "--granularity dimension --activation softmax --affine --init normal --lr-schedule linear",
        "--granularity layer --activation squared --init equal --l1 0.01 --lr-schedule constant",
        "--granularity adapter --activation sigmoid --init one-hot --target lab/rslora",
    ],
)
def test_every_axis_of_a_mixture_can_be_had(
    crawled: Recycle, pico_folder: Path, task: Path, tmp_path: Path, words: str
) -> None:
    asked = dict(pair.split() for pair in words.replace("--affine", "").split("--")[1:] if pair)
    line = ("tune", "lab/plain", "shop/mlp", "--task", task, "--base-model", pico_folder,
            *FEW_STEPS, *words.split(), "--out", "mixed", "--json")  # fmt: skip
    document = crawled(*line).document
    assert document["max_logit_deviation"] < 1e-4
    for name in set(asked) - {"method", "target"}:
        assert str(document["settings"][name.replace("-", "_")]) == asked[name]
    assert document["settings"]["affine"] == ("--affine" in words)
    if "adamerging" in words:
        assert document["settings"]["activation"] == "linear"
        assert document["settings"]["init"] == "equal"
    first = (tmp_path / "mixed/adapter_model.safetensors").read_bytes()
    crawled(*document["command"][1:], "--force")
    assert (tmp_path / "mixed/adapter_model.safetensors").read_bytes() == first


def test_eval_pairs_every_adapter_with_the_baseline(
    crawled: Recycle, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    documents = crawled(
        "eval", *POOL, "--task", task, "--base-model", pico_folder, "--baseline", "lab/plain",
        "--samples", "rows.jsonl", "--json",
    ).documents  # fmt: skip
    base, plain, *others = documents
    assert base["adapter"] == "base"
    assert plain["paired"] is None
    samples = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert len(samples) == 5 * 40
    for document in others:
        right = [s["correct"] for s in samples if s["adapter"] == document["adapter"]["id"]]
        assert document["metrics"]["acc"] == sum(right) / 40
        difference = document["metrics"]["acc"] - plain["metrics"]["acc"]
        assert document["paired"]["difference"] == pytest.approx(difference)
        assert document["paired"]["baseline"] == "lab/plain"
        assert 0 < document["paired"]["p_value"] <= 1


def test_eval_of_open_rows_writes_answers(
    crawled: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "open", test=6, closed=False)
    base, plain = crawled(
        "eval", "lab/plain", "--task", task, "--base-model", pico_folder, "--max-new-tokens", "4",
        "--json",
    ).documents  # fmt: skip
    assert base["metrics"].keys() == plain["metrics"].keys() == {"exact_match"}
    assert any("rows" in warning for warning in base["warnings"])


def test_a_gate_that_is_not_met_ends_with_3(
    crawled: Recycle, pico_folder: Path, task: Path
) -> None:
    words = ("eval", "lab/plain", "--task", task, "--base-model", pico_folder, "--fail-under")
    assert crawled(*words, "acc=0").exit_code == 0
    refused = crawled(*words, "acc=1", "--json", succeeds=False)
    assert refused.exit_code == 3
    assert len(refused.documents) == 2, "the result is still printed"
    assert refused.stderr.splitlines()[-2].startswith("error: lab/plain has acc 0.")


def test_everything_is_shown_to_people_too(
    crawled: Recycle, pico_folder: Path, pool: Path, task: Path
) -> None:
    base = ("--base-model", pico_folder)
    assert "4 accepted, 1 rejected" in crawled("crawl", pool, *base).stdout
    assert "lab/plain" in crawled("select", "--task", task, "-k", "4", *base).stdout
    assert "merged" in crawled("merge", "lab/plain", "shop/mlp", *base, "--out", "merged").stdout
    tuned = crawled("tune", "lab/plain", "--task", task, *base, *FEW_STEPS, "--out", "tuned")
    assert "best step" in tuned.stdout
    assert "95 % interval" in crawled("eval", "tuned", "--task", task, *base).stdout
