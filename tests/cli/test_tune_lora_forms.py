"""Architectures, schedules and allocations of a LoRA, on the real command."""

import itertools
import json
import shlex
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
from recycle_cli.errors import InputError
from recycle_cli.lora.folder import read_adapter, weights_sha256
from recycle_cli.tuning.choices import PROXIES
from recycle_cli.tuning.lora_allocations import proxies
from recycle_cli.tuning.lora_catalog import AXES, OPTIONS, check_combination, names_on
from recycle_cli.workflows.tune_card import FIGURES

AXIS = ("architecture", "schedule", "allocation")
FORMS = [(axis, name) for axis in AXIS for name in names_on(axis) if name != AXES[axis]]
FULL = 32
"""The smaller side of the modules above: the rank of what no small LoRA equals."""
RANKS = {"dual": FULL, "dora": FULL, "res-bs": 8, "rac": 16, "cola": 16, "hetero": 16, "adalora": 6}
INEXACT = ("res-ms", "res-is")


@pytest.mark.parametrize(("axis", "name"), FORMS)
def test_every_form_ends_as_a_folder_that_peft_computes_the_same_with(
    tune: Tune, pico_base: BaseModel, pico_folder: Path, axis: str, name: str
) -> None:
    document = tune(*SHAPE, *PACE, "--warmup", 0, "--lr", 0.02, f"--{axis}", name).document
    assert document["best"]["step"] > 0
    assert document["best"]["valid_loss"] < document["history"][0][1]
    if name not in INEXACT:
        assert document["max_logit_deviation"] < 1e-4
    # Of the best step; a chain has no more blocks than steps.
    assert document["rank"] <= RANKS.get(name, 4)
    if name in ("dual", "dora", "res-bs", "hetero"):
        assert document["rank"] == RANKS[name]
    assert document["energy_kept"] == 1
    settings = document["settings"]
    own = {axis: name, **OPTIONS[name].defaults}
    assert {key: settings[key] for key in own} == own
    assert f"--{axis} {name}" in shlex.join(document["command"])
    folder = Path(document["path"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert OPTIONS[name].paper in card
    for figure, value in document["figures"].items():
        assert f"{FIGURES[figure]}: {value:.4g}." in card
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
    # What was written goes on into the rest of the program.
    merged = tune.recycle("merge", folder, "--rank", 2, "--out", "cut", "--json").document
    assert merged["rank"] == 2


NO_STEPS = {"adalora": "finds the ranks in its steps"}
"""The options that say that they need some."""


@pytest.mark.parametrize("name", OPTIONS)
def test_without_steps_every_option_ends_at_its_start_or_says_why_not(
    tune: Tune, name: str
) -> None:
    words = (*SHAPE, "--rows", 20, "--steps", 0, f"--{OPTIONS[name].axis}", name)
    if name in NO_STEPS:
        assert_refused(tune(*words, succeeds=False), 2, NO_STEPS[name])
        return
    document = tune(*words).document
    assert document["best"]["step"] == 0
    assert document["max_logit_deviation"] < 1e-5
    # DoRA's is a difference of weights, up to rounding.
    written = read_adapter(Path(document["path"])).update
    assert all(float(piece.dense().abs().max()) < 1e-6 for piece in written.values())


@pytest.mark.parametrize("name", ["dual", "dora", "cola"])
def test_an_export_of_a_lower_rank_tells_what_it_lost(tune: Tune, name: str) -> None:
    axis = OPTIONS[name].axis
    words = (*SHAPE, *PACE, "--warmup", 0, "--lr", 0.02, f"--{axis}", name)
    whole = tune(*words).document
    cut = tune(*words, "--export-rank", 3, out="cut").document
    assert cut["rank"] == 3
    updates = [read_adapter(Path(document["path"])).update for document in (whole, cut)]
    lost = all_of = 0.0
    for path, piece in updates[0].items():
        dense = piece.dense().double()
        lost += float((dense - updates[1][path].dense().double()).square().sum())
        all_of += float(dense.square().sum())
    assert 1 - cut["energy_kept"] == pytest.approx(lost / all_of, rel=1e-3)
    assert cut["max_logit_deviation"] > whole["max_logit_deviation"]
    lost_share = cut["figures"]["relative_error"]
    assert lost_share == pytest.approx((lost / all_of) ** 0.5, rel=1e-3)
    assert cut["figures"]["written_valid_loss"] != cut["best"]["valid_loss"]
    assert "written_valid_loss" not in whole["figures"]
    card = (Path(cut["path"]) / "README.md").read_text(encoding="utf-8")
    assert f"{cut['energy_kept']:.2%} of the energy is kept" in card
    assert f"Relative error of the update that was written: {lost_share:.4g}." in card
    assert "Validation loss of what was written, in nats: " in card


@pytest.mark.parametrize(
    "words",
    [
        ("--proxy", "constant"),
        ("--proxy", "snip", "--proxy-steps", 2),
        ("--proxy", "synflow", "--proxy-steps", 2),
        ("--reallocate-every", 2),
        ("--schedule", "copra"),
        ("--architecture", "dual"),
        ("--architecture", "res-bs", "--previous", 1),
        ("--architecture", "dora"),
        ("--optimizer", "rite"),
        ("--reallocate-every", 2, "--optimizer", "loraplus"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_hetero_goes_with_the_other_axes(tune: Tune, words: tuple[object, ...]) -> None:
    common = (*SHAPE, *PACE, "--warmup", 0, "--lr", 0.02, "--allocation", "hetero")
    document = tune(*common, "--share", 0.5, *words).document
    adapted = read_adapter(Path(document["path"])).update
    assert 0 < len(adapted) < 4
    figures = document["figures"]
    if "--reallocate-every" in words:
        assert figures["scorings"] == 2
    assert (0.5 if "--reallocate-every" in words else 0.9) < figures["share_of_uniform"] <= 1
    assert figures["modules_on"] == len(adapted)


@pytest.mark.parametrize("words", ["--proxy snip --proxy-steps 1000000", "--reallocate-every 2"])
def test_a_dry_run_of_hetero_scores_nothing(tune: Tune, tmp_path: Path, words: str) -> None:
    """It tells of large LoRAs in all modules, before some are chosen."""
    common = (*SHAPE, *PACE, "--allocation", "hetero", *words.split())
    told = tune(*common, "--dry-run").document
    sides = 32 + 32, 32 + 64
    assert told["trained_numbers"] == 2 * sum(16 * side for side in sides)
    plain = tune(*SHAPE, *PACE, "--dry-run").document
    assert told["training_bytes"] > plain["training_bytes"]
    assert not any(path.name.startswith((".new", "new")) for path in tmp_path.iterdir())


def test_options_that_do_not_go_together_are_named(tune: Tune) -> None:
    refused = set()
    for one, other in itertools.combinations(FORMS, 2):
        if one[0] == other[0]:
            continue
        given = dict((one, other))
        words = [word for axis, name in given.items() for word in (f"--{axis}", name)]
        try:
            check_combination(given)
        except InputError:
            refused.add((one[1], other[1]))
            done = tune(*SHAPE, *PACE, *words, succeeds=False)
            assert_refused(done, 2, "cannot be combined with", one[1], other[1])
    assert ("dual", "rac") in refused
    assert ("dual", "hetero") not in refused
    assert len(refused) == 25


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--allocation", "hetero", "--proxy", "snip"), "B is zero in every module"),
        (
            ("--allocation", "hetero", "--proxy", "synflow", "--reallocate-every", 2),
            "use --proxy grad-norm",
        ),
        (
            ("--allocation", "hetero", "--reallocate-every", 2, "--proxy-steps", 2),
            "--proxy-steps has no effect",
        ),
        (
            ("--allocation", "hetero", "--reallocate-every", 2, "--schedule", "copra"),
            "--schedule copra is another way",
        ),
        (
            ("--allocation", "hetero", "--reallocate-every", 2, "--architecture", "dora"),
            "--architecture dora is another way",
        ),
        (("--allocation", "hetero", "--proxy", "grad"), "did you mean grad-norm"),
        (("--allocation", "hetero", "--share", 0), "--share"),
        (("--blocks", 3), "use --schedule rac or --schedule cola"),
        (("--schedule", "cola", "--previous", 3), "--architecture res-bs"),
        (("--architecture", "dual", "--rank", 1), "use a --rank of 2 or more"),
        (("--architecture", "dual", "--rslora"), "leave out --rslora"),
        (("--architecture", "res-ms", "--gradient-checkpointing"), "use --architecture res-bs"),
        (("--allocation", "adalora", "--rslora"), "finds the ranks itself"),
        (("--architecture", "res", "--rank", 2), "did you mean"),
    ],
)
def test_what_cannot_be_done_is_refused(tune: Tune, words: tuple[object, ...], said: str) -> None:
    done = tune(*PACE, *words, succeeds=False)
    assert_refused(done, 2, said)


def test_the_catalog_and_the_code_know_the_same_proxies() -> None:
    assert tuple(proxies.PROXIES) == PROXIES


def test_block_shortcuts_go_with_gradient_checkpointing(tune: Tune) -> None:
    words = (*SHAPE, *PACE, "--dropout", 0, "--lr", 0.02, "--architecture", "res-bs")
    plain = tune(*words).document
    again = tune(*words, "--gradient-checkpointing", out="again").document
    updates = [read_adapter(Path(document["path"])).update for document in (plain, again)]
    for path, piece in updates[0].items():
        torch.testing.assert_close(piece.dense(), updates[1][path].dense(), rtol=0, atol=1e-4)


KILLED = [
    ("--architecture", "res-ms"),
    ("--schedule", "rac"),
    ("--allocation", "hetero", "--reallocate-every", "3"),
]


@pytest.mark.parametrize("words", KILLED, ids=lambda words: words[1])
def test_a_killed_run_ends_as_the_undisturbed_one(
    tune: Tune, tmp_path: Path, task: Path, pico_folder: Path, words: tuple[str, ...]
) -> None:
    line = [*SHAPE, "--steps", 40, "--eval-every", 2, "--batch-size", 2, "--lr", 0.01]
    line += [*words, "--patience", 1000, "--dropout", 0.2]
    expected = tune(*line, out="whole").document
    common = ["--task", task, "--base-model", pico_folder, "--out", "killed"]
    kept = tmp_path / ".killed.unfinished/lora/state.safetensors"
    kill_once_kept(["tune", *map(str, [*line, *common])], tmp_path, kept)
    done = tune(*line, "--resume", out="killed")
    assert "going on from step" in done.stderr
    assert done.document["sha256"] == expected["sha256"]
    assert json.dumps(done.document["history"]) == json.dumps(expected["history"])
    assert done.document["figures"] == expected["figures"]
