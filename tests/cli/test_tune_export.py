"""What a mixture is written as, and what a run says before it starts."""

from pathlib import Path

import pytest
from support.command import Recycle, assert_refused

FEW = ("--steps", "4", "--eval-every", "2", "--batch-size", "4")


@pytest.fixture
def line(task: Path, pico_folder: Path) -> tuple[object, ...]:
    return ("lab/plain", "shop/mlp", "--task", task, "--base-model", pico_folder, *FEW)


def test_a_mixture_goes_into_the_base_model_by_the_code_of_merge(
    crawled: Recycle, line: tuple[object, ...], pico_folder: Path
) -> None:
    tuned = crawled("tune", *line, "--out", "mixed", "--json")
    into = ("--method", "linear", "--into-base", pico_folder, "--check", "--out", "model", "--json")
    merged = crawled("merge", "-", *into, stdin=tuned.stdout).document
    assert merged["form"] == "model"
    assert merged["max_logit_deviation"] < 1e-4


def test_a_dry_run_tells_and_writes_nothing(
    crawled: Recycle, line: tuple[object, ...], tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ("tune", *line, "--train-target", "--target-rank", "2", "--out", "new", "--dry-run")
    lora, mixture = crawled(*words, "--json").documents
    assert (lora["method"], mixture["method"]) == ("lora", "recycle")
    assert lora["trained_numbers"] > mixture["trained_numbers"] > 0
    assert mixture["training_bytes"] > 0
    assert mixture["model_bytes"] == lora["model_bytes"] > mixture["adapters_bytes"] > 0
    assert "may be taken" in crawled(*words).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_short_memory_makes_the_passes_smaller_and_the_result_the_same(
    crawled: Recycle, line: tuple[object, ...]
) -> None:
    told = crawled("tune", *line, "--out", "new", "--dry-run", "--json").document
    limit = f"{int((told['adapters_bytes'] + 0.6 * told['training_bytes']) / 1000)}kB"
    whole = crawled("tune", *line, "--out", "whole", "--json").document
    short = crawled("tune", *line, "--max-memory", limit, "--out", "short", "--json")
    assert "memory is short: rows go 2 at a time, where 4 were asked for" in short.stderr
    assert short.document["settings"]["micro_batch"] == 2
    for ours, theirs in zip(short.document["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_short_memory_makes_the_passes_of_a_search_smaller(
    crawled: Recycle, line: tuple[object, ...]
) -> None:
    words = ("tune", *line[:6], "--method", "lorahub", "--steps", 4)
    told = crawled(*words, "--out", "new", "--dry-run", "--json").document
    assert told["rows_a_pass"] == 32
    limit = f"{int((told['adapters_bytes'] + 0.3 * told['training_bytes']) / 1000)}kB"
    whole = crawled(*words, "--out", "whole", "--json").document
    short = crawled(*words, "--max-memory", limit, "--out", "short", "--json").document
    assert (whole["settings"]["batch_size"], short["settings"]["batch_size"]) == (32, 8)
    for ours, theirs in zip(short["history"], whole["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("method", [["pi-tuning"], ["rescale"], ["recycle", "--init", "one-hot"]])
def test_a_dry_run_counts_the_target_lora_that_it_would_train(
    crawled: Recycle, line: tuple[object, ...], method: list[str]
) -> None:
    adapters = () if method == ["rescale"] else line[:2]
    words = ("tune", *adapters, *line[2:], "--method", *method, "--train-target")
    lora, mixture = crawled(
        *words, "--target-rank", 2, "--out", "new", "--dry-run", "--json"
    ).documents
    assert mixture["adapters"] == len(adapters) + 1
    if method == ["pi-tuning"]:  # which trains the target's factors, and adds no LoRA of its own
        both = crawled(
            *words, "--target-rank", 2, "--target-steps", 0, "--out", "new", "--json"
        ).document
        assert both["settings"]["new_rank"] is None
        assert "new_lora_coefficient" not in both["figures"]
    assert lora["adapters"] == 0


@pytest.mark.parametrize(
    ("limit", "said"),
    [("1kB", "and 1 kB may be taken"), ("some", "--max-memory is 'some'"), ("5", "unit")],
)
def test_memory_that_does_not_suffice_is_refused(
    crawled: Recycle, line: tuple[object, ...], limit: str, said: str
) -> None:
    words = ("tune", *line, "--max-memory", limit, "--out", "new")
    done = crawled(*words, succeeds=False)
    assert_refused(done, 1 if limit == "1kB" else 2, said)


def test_verbose_tells_how_products_are_computed(
    crawled: Recycle, line: tuple[object, ...]
) -> None:
    done = crawled("-v", "tune", *line, "--out", "new")
    assert "modules side by side" in done.stderr
    assert "training takes about" in done.stderr
