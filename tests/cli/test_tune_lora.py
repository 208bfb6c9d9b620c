"""The ways to train a LoRA, on the real command."""

import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.command import assert_refused
from support.folders import logits_of
from support.tune import PACE, SHAPE, Tune
from transformers import AutoModelForCausalLM

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.folder import read_adapter, weights_sha256
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_catalog import OPTIONS, names_on
from recycle_cli.tuning.target_lora import LoraRecipe

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


def test_a_rate_and_a_rank_are_found_by_halving(tune: Tune) -> None:
    words = ("--target-module", "q_proj", "--rows", 20, "--eval-every", 4, "--batch-size", 4)
    document = tune(*words, "--steps", 12, "--lr", "auto", "--rank", "auto").document
    sweep, settings = document["sweep"], document["settings"]
    assert sweep["grid"] == {"lr": pytest.approx([1e-4, 3e-4, 9e-4, 3e-3]), "rank": [8, 16]}
    rounds: dict[int, list[dict[str, Any]]] = {}
    trials = iter(sweep["trials"])
    left = None
    for number, count in enumerate((8, 4, 2)):
        rounds[number] = [next(trials) for _ in range(count)]
        if left is not None:
            found = sorted((t["lr"], t["rank"]) for t in rounds[number])
            assert found == sorted(left)
        best = sorted(rounds[number], key=lambda t: t["valid_loss"])
        left = [(t["lr"], t["rank"]) for t in best[: -(-count // 2)]]
    assert next(trials, None) is None
    assert left == [(sweep["chosen"]["lr"], sweep["chosen"]["rank"])]
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
