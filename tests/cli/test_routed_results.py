"""A result that routes token by token: scored, and refused where a LoRA is wanted."""

from pathlib import Path

import pytest
from support.command import Recycle, assert_refused

FEW = ("--steps", "4", "--eval-every", "2", "--batch-size", "4", "--lr", "0.1")


@pytest.fixture
def line(task: Path, pico_folder: Path) -> tuple[object, ...]:
    return (
        "lab/plain", "lab/rslora", "shop/mlp", "--task", task, "--base-model", pico_folder,
        "--method", "arrow",
    )  # fmt: skip


def test_it_is_made_and_scored(crawled: Recycle, line: tuple[object, ...], tmp_path: Path) -> None:
    made = crawled("tune", *line, *FEW, "--out", "routed", "--json")
    document = made.document
    assert document["max_logit_deviation"] < 1e-5
    assert document["best"]["step"] > 0
    assert document["settings"]["top_k"] == 4
    assert any("PEFT cannot load it" in warning for warning in document["warnings"])
    written = {path.name for path in (tmp_path / "routed").iterdir()}
    assert written == set(document["files"])
    assert "adapter_config.json" not in written
    base, scored = crawled("eval", "-", "--rows", "35", "--json", stdin=made.stdout).documents
    assert base["adapter"] == "base"
    assert scored["adapter"]["sha256"] == document["sha256"]
    by_name = ("--task", line[4], "--base-model", line[6], "--rows", "35", "--json")
    again = crawled("eval", "routed", *by_name).documents[1]
    assert again["metrics"] == scored["metrics"]
    assert "routes" not in (tmp_path / "routed/README.md").read_text().splitlines()[0]


def test_without_steps_it_needs_no_training(crawled: Recycle, line: tuple[object, ...]) -> None:
    document = crawled("tune", *line, "--top-k", "1", "--out", "routed", "--json").document
    assert document["best"]["step"] == 0
    assert len(document["history"]) == 1
    shares = [adapter["coefficient_mean"] for adapter in document["adapters"]]
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_it_starts_from_an_earlier_one(crawled: Recycle, line: tuple[object, ...]) -> None:
    first = crawled("tune", *line, *FEW, "--out", "first", "--json").document
    second = crawled("tune", *line, "--init-from", "first", "--out", "second", "--json").document
    assert second["sha256"] == first["sha256"]


def test_force_replaces_it(crawled: Recycle, line: tuple[object, ...]) -> None:
    crawled("tune", *line, "--out", "routed")
    crawled("tune", *line, "--top-k", "2", "--out", "routed", "--force")


def test_it_is_no_lora(crawled: Recycle, line: tuple[object, ...], task: Path) -> None:
    crawled("tune", *line, "--out", "routed")
    base = ("--base-model", line[6])
    for words in (
        ("merge", "routed", "lab/plain", *base, "--out", "new"),
        ("tune", "routed", "--task", task, *base, "--out", "new"),
        ("tune", "lab/plain", "--target", "routed", "--task", task, *base, "--out", "new"),
    ):
        refused = crawled(*words, succeeds=False)
        assert_refused(refused, 2, "'routed' routes token by token", "recycle eval")
    other = crawled("tune", *line, "--rank", "4", "--out", "new", succeeds=False)
    assert_refused(other, 2, "--rank has no effect with --method arrow")
