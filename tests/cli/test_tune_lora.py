"""The ways to train a LoRA, on the real command."""

import json
import math
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.command import assert_refused, kill_once_kept
from support.folders import logits_of
from support.tune import PACE, SHAPE, Tune
from transformers import AutoModelForCausalLM

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.training import Diverged, finite
from recycle_cli.lora.folder import read_adapter, weights_sha256
from recycle_cli.records import TuneSweep
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_catalog import OPTIONS, names_on
from recycle_cli.tuning.target_lora import LoraRecipe
from recycle_cli.workflows import tune_sweep

PAPER = {"rank": 64, "alpha": 16, "dropout": 0.1, "lr": 3e-4, "steps": 400, "batch_size": 8}


@pytest.mark.parametrize("name", names_on("optimizer"))
def test_every_optimizer_ends_as_a_folder_that_peft_computes_the_same_with(
    tune: Tune, pico_base: BaseModel, pico_folder: Path, name: str
) -> None:
    lr = 0.3 if "lr" in OPTIONS[name].pace else 0.02
    document = tune(*SHAPE, *PACE, "--warmup", 0, "--lr", lr, "--optimizer", name).document
    assert document["best"]["step"] > 0
    assert document["max_logit_deviation"] < 1e-5
    assert document["rank"] == 4
    settings = document["settings"]
    own = {"optimizer": name, **OPTIONS[name].defaults}
    assert {key: settings[key] for key in own} == own
    assert f"--optimizer {name}" in shlex.join(document["command"]) or name == "adamw"
    folder = Path(document["path"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (OPTIONS[name].paper in card) == (name != "adamw")
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded: Any = PeftModel.from_pretrained(model, folder).eval()
    texts = ("Which colour has item 5?",)
    moved = logits_of(loaded, pico_base.tokenizer, texts)
    before = logits_of(pico_base.model, pico_base.tokenizer, texts)
    assert float((moved - before).abs().max()) > 1e-4
    again = tune.recycle(*map(str, document["command"][1:]), "--json", "--force").document
    assert again["sha256"] == document["sha256"] == weights_sha256(folder)


def test_lora_fa_leaves_a_as_it_was_drawn(tune: Tune) -> None:
    words = (*SHAPE, "--rows", 20)
    start = read_adapter(Path(tune(*words, "--steps", 0, out="start").document["path"])).update
    moved = tune(*words, *PACE, "--lr", 0.02, "--optimizer", "lora-fa").document
    for path, piece in read_adapter(Path(moved["path"])).update.items():
        assert torch.equal(piece.A, start[path].A)
        assert piece.B.any()


def test_the_rank_of_the_export_can_be_cut(tune: Tune) -> None:
    document = tune(*SHAPE, *PACE, "--lr", 0.02, "--export-rank", 2).document
    assert document["rank"] == 2
    assert 0 < document["energy_kept"] < 1
    assert document["max_logit_deviation"] > 0
    assert document["settings"]["export_rank"] == "2"
    assert "--export-rank 2" in shlex.join(document["command"])


def test_the_target_lora_of_a_mixture_is_trained_so_too(tune: Tune, pool: Path) -> None:
    words = ("--train-target", "--target-optimizer", "rite", "--update-skipping", 0)
    document = tune(
        pool / "lab/plain", *words, "--target-rank", 2, "--target-steps", 2, "--steps", 2
    ).document
    assert "--target-optimizer rite --update-skipping 0.0" in shlex.join(document["command"])
    assert document["settings"]["optimizer"] == "adamw"
    record = (Path(document["path"]) / "target/recycle.json").read_text(encoding="utf-8")
    assert '"optimizer": "rite"' in record
    assert '"update_skipping": 0.0' in record


def test_without_a_preset_it_is_the_papers(tune: Tune) -> None:
    """Rank 64, alpha 16, dropout 0.1, all linear modules, 400 steps of 8 rows at 3e-4."""
    for words in ((), ("--preset", "paper")):
        told = tune("--rows", 20, *words, "--dry-run", out="dry").document
        numbers = 2 * 64 * sum(32 + out for out in (32, 16, 16, 32, 64, 64, 64))
        assert (told["trained_numbers"], told["batch_size"]) == (numbers, 8)
    pace = METHODS["lora"].pace
    assert {**vars(LoraRecipe()), **vars(pace)}.items() >= PAPER.items()
    assert (pace.lr_schedule, pace.warmup) == ("cosine", 0.1)


def test_the_small_preset_gives_way_to_what_is_asked_for(tune: Tune) -> None:
    words = ("--preset", "small", "--steps", 2, "--target-module", "q_proj", "--rows", 20)
    document = tune(*words, "--alpha", 4).document
    settings = document["settings"]
    assert (settings["rank"], settings["alpha"], settings["dropout"]) == (8, 4, 0.0)
    assert (settings["lr"], settings["steps"], settings["patience"]) == (2e-3, 2, 4)
    assert "--preset small" in shlex.join(document["command"])
    own = tune(*words, "--optimizer", "psi-lora", out="own").document
    assert own["settings"]["lr"] == OPTIONS["psi-lora"].pace["lr"]
    times = OPTIONS["copra"].lr_times
    assert times != 1
    usual = tune(*words, "--schedule", "copra", out="copra").document
    assert usual["settings"]["lr"] == pytest.approx(times * 2e-3)
    given = tune(*words, "--schedule", "copra", "--lr", 1e-3, out="given").document
    assert given["settings"]["lr"] == 1e-3


def test_a_rate_and_a_rank_are_found_by_halving(tune: Tune) -> None:
    words = ("--target-module", "q_proj", "--rows", 20, "--eval-every", 4, "--batch-size", 4)
    document = tune(*words, "--steps", 12, "--lr", "auto", "--rank", "auto").document
    sweep, settings = document["sweep"], document["settings"]
    assert sweep["grid"] == {"lr": pytest.approx([1e-4, 3e-4, 9e-4, 3e-3]), "rank": [8, 16]}
    rounds: dict[int, list[dict[str, Any]]] = {}
    trials = iter(sweep["trials"])
    left = None
    # 10 steps, then the training's 12: more rounds would find the same again.
    for number, count in enumerate((8, 4)):
        rounds[number] = [next(trials) for _ in range(count)]
        if left is not None:
            found = sorted((t["lr"], t["rank"]) for t in rounds[number])
            assert found == sorted(left)
        best = sorted(rounds[number], key=lambda t: t["valid_loss"])
        left = [(t["lr"], t["rank"]) for t in best[: -(-count // 2)]]
    assert left
    assert {t["steps"] for t in rounds[0]} == {10}
    assert {t["steps"] for t in rounds[1]} == {12}
    assert next(trials, None) is None
    assert left[0] == (sweep["chosen"]["lr"], sweep["chosen"]["rank"])
    assert (settings["lr"], settings["rank"]) == left[0]
    assert document["rank"] == left[0][1]
    assert sweep["steps"] == sum(trial["steps"] for trial in sweep["trials"])
    assert 0 < sweep["elapsed_s"] < document["elapsed_s"]
    command = shlex.join(document["command"])
    assert "--lr auto" in command
    assert "--rank auto" in command
    fixed = tune(
        *words, "--steps", 12, "--lr", settings["lr"], "--rank", settings["rank"], out="fixed"
    ).document
    assert fixed["sha256"] == document["sha256"]
    assert fixed["sweep"] is None


SWEPT = ("--target-module", "q_proj", "--rank", 2, "--rows", 20, "--batch-size", 4, "--lr", "auto")


@pytest.mark.parametrize("steps", [2, 10])
def test_a_sweep_for_a_short_training_tries_each_candidate_once(tune: Tune, steps: int) -> None:
    done = tune(*SWEPT, "--steps", steps)
    sweep = done.document["sweep"]
    assert [trial["lr"] for trial in sweep["trials"]] == sweep["grid"]["lr"]
    assert {trial["steps"] for trial in sweep["trials"]} == {steps}
    assert sweep["steps"] == 4 * steps
    assert "going on from" not in done.stderr


def test_steps_before_scores_are_counted(tune: Tune) -> None:
    words = ("--allocation", "hetero", "--proxy", "snip", "--proxy-steps", 3, "--share", 0.5)
    sweep = tune(*SWEPT, "--steps", 2, *words).document["sweep"]
    assert {trial["proxy_steps"] for trial in sweep["trials"]} == {3}
    assert sweep["steps"] == 4 * (2 + 3)


def test_a_rate_at_the_edge_of_the_grid_is_warned_of(tune: Tune) -> None:
    """From so small a rate, the highest is the best in few steps."""
    document = tune(*SWEPT, "--steps", 2).document
    assert document["sweep"]["chosen"]["lr"] == max(document["sweep"]["grid"]["lr"])
    told = "is the highest of those tried: the best may be higher."
    assert any(warning.endswith(told) for warning in document["warnings"])
    card = (Path(document["path"]) / "README.md").read_text(encoding="utf-8")
    assert told in card


def test_a_rate_that_diverges_is_ruled_out(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_sweep, "LR_GRID", (1.0, 3.0, 10.0, 1e38))
    document = tune(*SWEPT, "--steps", 20).document
    first, sweep = document["sweep"]["trials"][:4], document["sweep"]
    assert [trial["valid_loss"] is None for trial in first] == [False, False, False, True]
    assert (first[3]["steps"], len(sweep["trials"])) == (10, 6)
    assert all(trial["lr"] < 1 for trial in sweep["trials"][4:])
    assert document["settings"]["lr"] == sweep["chosen"]["lr"] < 1
    # Of the rates that can be trained it is the highest, but not of those tried.
    assert not any("of those tried" in warning for warning in document["warnings"])
    card = (Path(document["path"]) / "README.md").read_text(encoding="utf-8")
    assert "6 short trainings, of which 1 diverged" in card


def test_where_all_rates_diverge_the_hint_is_for_who_left_it_to_be_found(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_sweep, "LR_GRID", (1e37, 1e38))
    done = tune(*SWEPT, "--steps", 4, succeeds=False)
    assert_refused(done, 1, "with none of the 2 candidates", "--lr auto tries none below 3e+33")
    assert not any(path.name.startswith((".new", "new")) for path in tmp_path.iterdir())


def test_an_interrupted_sweep_goes_on_with_what_it_has(
    tune: Tune, tmp_path: Path, task: Path, pico_folder: Path
) -> None:
    line = (*SWEPT, "--steps", 24, "--eval-every", 2, "--patience", 1000)
    whole = tune(*line, out="whole").document
    state = tmp_path / ".killed.unfinished"
    common = ("--task", task, "--base-model", pico_folder, "--out", "killed")
    kill_once_kept(["tune", *map(str, [*line, *common])], tmp_path, state / "sweep.json")
    shutil.copytree(state, tmp_path / ".again.unfinished")
    kept = json.loads((state / "sweep.json").read_text(encoding="utf-8"))
    assert 0 < len(kept["trials"]) < len(whole["sweep"]["trials"])
    # As if the first process had taken an hour, and found something else.
    name = next(iter(kept["trials"]))
    kept["trials"][name]["valid_loss"] = 0.5
    (state / "sweep.json").write_text(json.dumps({**kept, "elapsed_s": 3600.0}), encoding="utf-8")
    other = tune(*line, "--resume", "--seed", 1, out="killed", succeeds=False)
    assert_refused(other, 2, "differs in seed")
    document = tune(*line, "--resume", out="killed").document
    assert document["sweep"]["trials"][0]["valid_loss"] == 0.5
    assert document["sweep"]["trials"][1] == whole["sweep"]["trials"][1]
    assert document["sweep"]["elapsed_s"] > 3600
    assert not state.exists()
    # Where both that went on have diverged since, those that were let go come back.
    grid = whole["sweep"]["grid"]["lr"]
    trials = {f"lr {lr:g}, 10 steps": {"lr": lr, "steps": 10, "valid_loss": lr} for lr in grid}
    for lr in grid[:2]:
        trials[f"lr {lr:g}, 20 steps"] = {"lr": lr, "steps": 20, "valid_loss": None}
    again = {**kept, "trials": trials}
    state_file = tmp_path / ".again.unfinished/sweep.json"
    state_file.write_text(json.dumps(again), encoding="utf-8")
    sweep = tune(*line, "--resume", out="again").document["sweep"]
    assert [(t["lr"], t["steps"]) for t in sweep["trials"][4:]] == [(lr, 20) for lr in grid]
    assert sweep["chosen"]["lr"] in grid[2:]


def test_a_training_that_diverges_at_a_rate_that_was_found_says_so() -> None:
    sweep = TuneSweep(grid={"lr": [0.3, 0.9]}, trials=[], chosen={"lr": 0.9}, steps=0, elapsed_s=0)
    with pytest.raises(Diverged) as caught, tune_sweep.rate_found_by(sweep):
        finite(math.nan, "training")
    assert "at the rate of 0.9 that short trainings had found" in caught.value.message
    assert caught.value.hint == "give a lower one, as in --lr 0.3"
    with pytest.raises(Diverged, match=r"became nan$"), tune_sweep.rate_found_by(None):
        finite(math.nan, "training")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer rites", ("rites", "did you mean rite")),
        ("--optimizer ngopt", ("--optimizer ngopt does not go with --method lora", "loraplus")),
        ("--optimizer riemannian --update-skipping 1", ("--update-skipping has no effect",
                                                        "--optimizer rite")),
        ("--optimizer rite --update-skipping -1", ("--update-skipping is -1", "from 0")),
        ("--optimizer loraplus --lr-ratio 0.5", ("--lr-ratio is 0.5", "from 1")),
        ("--optimizer oplora --momentum 1", ("--momentum is 1", "[0, 0.999]")),
        ("--optimizer psi-lora --metric-damping 0", ("--metric-damping is 0", "above 0")),
        ("--granularity layer", ("--granularity has no effect with --method lora",)),
        ("--optimizer rite --rank 64", ("--optimizer rite", "rank of 64", "--rank of 16")),
        ("--target-optimizer rite", ("--target-optimizer is about", "--optimizer")),
        ("POOL/lab/plain --optimizer rite", ("--optimizer rite does not go with --method recycle",
                                             "adamw, ngopt")),
        ("POOL/lab/plain --preset small", ("--preset small is about a LoRA to train",)),
        ("POOL/lab/plain --update-skipping 1", ("--update-skipping has no effect",)),
        ("POOL/lab/plain --lr auto", ("--lr auto is about a LoRA to train",)),
        ("POOL/lab/plain --export-rank 2", ("--export-rank is about a LoRA to train",)),
        ("--preset smal", ("'smal'", "did you mean small")),
        ("--lr auto --steps 0", ("--lr auto finds it by short trainings",)),
        ("--lr fast", ("--lr is 'fast'", "auto")),
        ("--export-rank 0", ("--export-rank is '0'",)),
        ("--export-rank energy:2", ("--export-rank is 'energy:2'", "energy:E")),
        ("--optimizer oplora --inner-steps 1000000000", ("--inner-steps is 1000000000",
                                                         "[0, 1000]")),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    tune: Tune, pool: Path, tmp_path: Path, words: str, said: tuple[str, ...]
) -> None:
    line = words.replace("POOL", str(pool)).split()
    assert_refused(tune(*line, succeeds=False), 2, *said)
    assert not (tmp_path / "new").exists()
