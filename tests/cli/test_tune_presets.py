"""Every preset of `recycle tune` that mixes adapters into one LoRA, on the real command."""

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.command import Done, Recycle, assert_refused
from support.folders import logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.search import SearchPlan
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, weights_sha256
from recycle_cli.records import read_documents
from recycle_cli.tuning.catalog import METHODS, NGOPT, TuningMethod
from recycle_cli.tuning.tuned import Ingredients, Tuned

PRESETS = [method for method in METHODS.values() if method.mixes and not method.routed]
SENTENCES = ("Which colour has item 5?", "An answer, or none at all.", "zzz")
POOL = ("lab/plain", "shop/mlp", "lab/rslora")
FOLLOWED = ("--steps", 6, "--eval-every", 2, "--batch-size", 4, "--warmup", 0, "--lr", 0.02)
"""Large steps, so that some end lower on the validation rows than they began."""


def searches(method: TuningMethod) -> bool:
    return method.defaults.get("optimizer") == NGOPT


def pace(method: TuningMethod) -> tuple[object, ...]:
    return ("--steps", 30) if searches(method) else FOLLOWED


class Preset:
    """A method, and the words that run it on a pool."""

    def __init__(self, recycle: Recycle, pool: Path, task: Path, base: Path) -> None:
        self.recycle, self.pool = recycle, pool
        self.common = ("--task", task, "--base-model", base, "--seed", 3)

    def adapters(self, method: TuningMethod) -> list[object]:
        """The words that name them: the target LoRA alone, or the pool and it."""
        if method.takes == "target":
            return ["--target", self.pool / POOL[-1]]
        return [self.pool / name for name in POOL]

    def run(self, method: TuningMethod, out: str, *words: object, succeeds: bool = True) -> Done:
        return self.recycle(
            "tune", *self.adapters(method), "--method", method.name, *self.common, *words,
            "--out", out, "--json", succeeds=succeeds,
        )  # fmt: skip


@pytest.fixture
def preset(recycle: Recycle, pool: Path, task: Path, pico_folder: Path) -> Preset:
    return Preset(recycle, pool, task, pico_folder)


def of_peft(base: BaseModel, base_folder: Path, folder: Path) -> Tensor:
    """Logits of what PEFT makes of a folder, without a word of complaint."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("error", UserWarning)
        loaded: Any = PeftModel.from_pretrained(model, folder).eval()
    return logits_of(loaded, base.tokenizer, SENTENCES)


def rebuilt(base: BaseModel, document: dict[str, Any]) -> Tuned:
    """What was trained, from the adapters and the tensors beside the result."""
    method = METHODS[document["method"]]
    settings = {name: document["settings"][name] for name in method.defaults}
    roles = [adapter["role"] for adapter in document["adapters"]]
    ingredients = Ingredients(
        [read_adapter(Path(adapter["path"])).update for adapter in document["adapters"]],
        roles.index("target") if "target" in roles else None,
        document["seed"],
    )
    tuned = method.build(ingredients, settings)
    tuned.load(load_file(Path(document["path"]) / "mixture.safetensors"))
    return tuned


@pytest.mark.parametrize("method", PRESETS, ids=lambda method: method.name)
def test_plain_peft_computes_what_was_trained(
    preset: Preset, pico_base: BaseModel, pico_folder: Path, method: TuningMethod
) -> None:
    document = preset.run(method, "mixed", *pace(method)).document
    assert document["best"]["step"] > 0, "else only the start is compared"
    assert document["max_logit_deviation"] < 1e-5
    found = of_peft(pico_base, pico_folder, Path(document["path"]))
    tuned = rebuilt(pico_base, document)
    with tuned.attached(pico_base):
        expected = logits_of(pico_base.model, pico_base.tokenizer, SENTENCES)
    before = logits_of(pico_base.model, pico_base.tokenizer, SENTENCES)
    assert float((expected - before).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert document["energy_kept"] == 1
    assert document["rank"] == max(
        p.rank for p in read_adapter(Path(document["path"])).update.values()
    )
    for share, adapter in zip(tuned.shares(), document["adapters"], strict=False):
        assert adapter["coefficient_mean"] == pytest.approx(share.mean)
        assert adapter["coefficient_max_abs"] == pytest.approx(share.max_abs)


@pytest.mark.parametrize("method", PRESETS, ids=lambda method: method.name)
def test_every_setting_in_force_is_told(preset: Preset, method: TuningMethod) -> None:
    told = preset.run(method, "mixed", "--steps", 0, "--rows", 30).document["settings"]
    plan = {one.name for one in fields(SearchPlan if searches(method) else TrainingPlan)}
    around = {"rows", "reinit", "export_rank", "init_from", "save_dtype", "base_dtype", "device"}
    assert set(told) == {*method.defaults, *plan, *around}
    assert {name: told[name] for name in method.defaults} == dict(method.defaults)
    if not searches(method):
        usual = {**vars(method.pace), "steps": 0}
        assert {name: told[name] for name in usual} == usual
    assert (told["seed"], told["steps"], told["rows"]) == (3, 0, 30)
    assert (told["base_dtype"], told["save_dtype"], told["device"]) == ("float32", "float32", "cpu")


@pytest.mark.parametrize("method", PRESETS, ids=lambda method: method.name)
def test_a_result_can_be_started_from(preset: Preset, tmp_path: Path, method: TuningMethod) -> None:
    first = preset.run(method, "first", *pace(method)).document
    again = preset.run(method, "again", "--init-from", "first", "--steps", 0).document
    assert again["sha256"] == first["sha256"] == weights_sha256(tmp_path / "again")
    assert again["best"] == {"step": 0, "valid_loss": pytest.approx(first["best"]["valid_loss"])}
    states = [load_file(tmp_path / out / "mixture.safetensors") for out in ("first", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with safe_open(tmp_path / "first/mixture.safetensors", framework="pt") as file:
        assert file.metadata()["method"] == method.name
    # And what is started from goes on from there, not from the method's own start.
    more = preset.run(method, "more", "--init-from", "first", *pace(method)).document
    assert more["history"][0][1] == pytest.approx(first["best"]["valid_loss"], abs=1e-5)


@pytest.mark.parametrize("method", PRESETS, ids=lambda method: method.name)
def test_what_others_trained_is_no_start(
    preset: Preset, pool: Path, tmp_path: Path, method: TuningMethod
) -> None:
    preset.run(method, "first", "--steps", 0)
    start = ("--init-from", "first", "--steps", 0, *preset.common, "--out", "again")
    words = preset.adapters(method)
    other = "recycle" if method.name == "adamerging" else "adamerging"
    done = preset.recycle("tune", *words, "--method", other, *start, succeeds=False)
    assert_refused(done, 2, f"is about another method: {method.name}")
    names = [[*words[:-1], pool / "lab/plain"]]
    if method.takes == "adapters":
        names = [words[:-1], [*words[1:], words[0]]]
    for named in names:
        line = ("tune", *named, "--method", method.name, *start)
        done = preset.recycle(*line, succeeds=False)
        assert_refused(done, 2, "first/mixture.safetensors is about other adapters or their order")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--activation squared", "another activation: leaky-relu, where this run has squared"),
        ("--granularity layer", "another granularity: module, where this run has layer"),
        ("--reinit experts", "another reinit: none, where this run has experts with seed 3"),
    ],
)
def test_numbers_that_would_mean_something_else_are_no_start(
    preset: Preset, tmp_path: Path, words: str, said: str
) -> None:
    method = METHODS["recycle"]
    preset.run(method, "first", "--steps", 0)
    start = ("--init-from", "first", "--steps", 0)
    assert_refused(preset.run(method, "again", *start, *words.split(), succeeds=False), 2, said)
    assert not (tmp_path / "again").exists()


def test_a_start_of_an_earlier_run_needs_no_slope_at_zero(preset: Preset) -> None:
    method, squared = METHODS["recycle"], ("--activation", "squared")
    preset.run(method, "first", *squared, "--init", "equal", *FOLLOWED)
    again = preset.run(method, "again", *squared, "--init-from", "first", *FOLLOWED).document
    assert again["settings"]["init"] is None


# --- the target LoRA -----------------------------------------------------------------------------

TARGET = ("--alpha", 6, "--dropout", 0.2, "--target-module", "q_proj", "--target-module", "up_proj")


def test_training_the_target_first_is_training_it_alone(
    preset: Preset, pool: Path, tmp_path: Path
) -> None:
    pair = (pool / "lab/plain", pool / "shop/mlp", *preset.common, *FOLLOWED)
    both = preset.recycle(
        "tune", *pair, "--train-target", "--target-rank", 3, "--target-steps", 4, "--target-lr",
        0.01, *TARGET, "--out", "both", "--json",
    ).document  # fmt: skip
    alone = preset.recycle(
        "tune", "--rank", 3, "--steps", 4, "--lr", 0.01, *TARGET, *preset.common, "--out", "alone",
        "--json",
    ).document  # fmt: skip
    mixed = preset.recycle("tune", *pair, "--target", "alone", "--out", "mixed", "--json").document
    assert alone["best"]["step"] > 0
    assert weights_sha256(tmp_path / "both/target") == alone["sha256"] == both["target"]["sha256"]
    assert both["sha256"] == mixed["sha256"]
    assert both["history"] == mixed["history"]
    assert [a["role"] for a in both["adapters"]] == ["pool", "pool", "target"]
    assert both["adapters"][2]["coefficient_mean"] == mixed["adapters"][2]["coefficient_mean"]
    (recorded,) = read_documents((tmp_path / "both/target/recycle.json").open())
    assert recorded.path == str(tmp_path / "both/target")
    told = {k: v for k, v in recorded.settings.items() if k != "micro_batch"}
    assert told == {k: v for k, v in alone["settings"].items() if k != "micro_batch"}
    assert set(both["files"]) == {
        str(p.relative_to(tmp_path / "both")) for p in (tmp_path / "both").rglob("*.*")
    }
    # The command in the record asks for the same, target and all.
    preset.recycle(*both["command"][1:], "--force")
    assert weights_sha256(tmp_path / "both") == mixed["sha256"]


def test_no_state_is_left_behind(preset: Preset, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    preset.run(METHODS["recycle"], "mixed", "--train-target", *SMALL_TARGET, *FOLLOWED)
    assert {path.name for path in tmp_path.iterdir()} == before | {"mixed"}


SMALL_TARGET = ("--target-rank", 2, "--target-steps", 2, "--target-module", "q_proj")


# --- controls ------------------------------------------------------------------------------------


def parts(preset: Preset, out: str, reinit: str) -> dict[str, dict[str, Tensor]]:
    """dW by module of each adapter in a mixture of equal shares, from the factors that the result
    stacks in the order of the adapters."""
    names = ("lab/plain", "shop/mlp", "lab/rslora")
    pool = [preset.pool / name for name in names]
    preset.recycle(
        "tune", *pool[:2], "--target", pool[2], "--method", "adamerging", "--init", "one",
        "--steps", 0, "--reinit", reinit, *preset.common, "--out", out,
    )  # fmt: skip
    ranks = [{m: p.rank for m, p in read_adapter(folder).update.items()} for folder in pool]
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for module, piece in read_adapter(Path(out).absolute()).update.items():
        at = 0
        for name, own in zip(names, ranks, strict=True):
            rows = slice(at, at := at + own.get(module, 0))
            if module in own:
                found[name][module] = piece.B[:, rows] @ piece.A[rows]
        assert at == piece.rank
    return found


def norms(update: dict[str, Tensor]) -> Tensor:
    return torch.stack([update[module].norm() for module in sorted(update)])


def test_controls_redraw_what_they_say(preset: Preset, pool: Path) -> None:
    real = {
        name: {m: p.dense() for m, p in read_adapter(pool / name).update.items()}
        for name in ("lab/plain", "shop/mlp", "lab/rslora")
    }
    drawn = {word: parts(preset, word, word) for word in ("none", "experts", "norm", "all")}

    def correlation(word: str, name: str) -> float:
        one, other = (
            torch.cat([part[name][m].ravel() for m in sorted(part[name])])
            for part in (real, drawn[word])
        )
        return float(torch.corrcoef(torch.stack([one, other]))[0, 1])

    for name in real:
        assert correlation("none", name) == pytest.approx(1, abs=1e-5)
        assert abs(correlation("all", name)) < 0.15
    for name in ("lab/plain", "shop/mlp"):
        assert abs(correlation("experts", name)) < 0.15
        assert abs(correlation("norm", name)) < 0.15
        torch.testing.assert_close(norms(drawn["norm"][name]), norms(real[name]), rtol=1e-4, atol=0)
        off = norms(drawn["experts"][name]) / norms(real[name])
        assert float((off - 1).abs().max()) > 0.01
        assert float((off - 1).abs().max()) < 1
        # `all` and `experts` draw the pool alike.
        for module, delta in drawn["all"][name].items():
            torch.testing.assert_close(delta, drawn["experts"][name][module])
    for word in ("experts", "norm"):
        assert correlation(word, "lab/rslora") == pytest.approx(1, abs=1e-5)


def test_controls_are_drawn_by_the_seed(preset: Preset) -> None:
    one = preset.run(METHODS["adamerging"], "one", "--steps", 0, "--reinit", "norm").document
    words = (*preset.adapters(METHODS["adamerging"]), "--method", "adamerging", *preset.common)
    again, other = (
        preset.recycle(
            "tune",
            *words,
            "--steps",
            0,
            "--reinit",
            "norm",
            "--seed",
            seed,
            "--out",
            seed,
            "--json",
        ).document
        for seed in (3, 4)
    )
    assert one["sha256"] == again["sha256"] != other["sha256"]


# --- the rank of the export ----------------------------------------------------------------------


def test_a_rank_limit_is_told_with_the_energy_it_keeps(preset: Preset, tmp_path: Path) -> None:
    method = METHODS["adamerging"]
    full = preset.run(method, "full", *FOLLOWED, "--rank", "full").document
    cut = preset.run(method, "cut", *FOLLOWED, "--rank", 2).document
    most = preset.run(method, "most", *FOLLOWED, "--rank", "energy:0.9").document
    assert full["energy_kept"] == 1
    assert full["rank"] == 4 + 8
    assert full["max_logit_deviation"] < 1e-5
    assert cut["rank"] == 2
    assert 0 < cut["energy_kept"] < 0.9 <= most["energy_kept"] < 1
    assert cut["max_logit_deviation"] > most["max_logit_deviation"] > 1e-3
    assert any("energy" in warning for warning in cut["warnings"])
    assert cut["history"] == full["history"]
    # By dense singular values.
    whole, kept = 0.0, 0.0
    for piece in read_adapter(tmp_path / "full").update.values():
        squares = torch.linalg.svdvals(piece.to(torch.float64).dense()).square()
        whole, kept = whole + float(squares.sum()), kept + float(squares[:2].sum())
    assert cut["energy_kept"] == pytest.approx(kept / whole, abs=1e-6)
    # What is started from is the mixture itself, not its export.
    again = preset.run(method, "again", "--init-from", "cut", "--steps", 0).document
    assert again["sha256"] == full["sha256"]


# --- what is said of the mixture -----------------------------------------------------------------


def test_a_mean_coefficient_is_over_the_modules_that_an_adapter_has(preset: Preset) -> None:
    document = preset.run(METHODS["adamerging"], "mixed", "--steps", 0).document
    for adapter in document["adapters"]:
        assert adapter["coefficient_mean"] == pytest.approx(3**-0.5)
        assert adapter["coefficient_max_abs"] == pytest.approx(3**-0.5)


def test_the_optimizer_is_told_as_it_is_asked_for(preset: Preset) -> None:
    method = METHODS["adamerging"]
    words = ("--optimizer", "ngopt", "--bound", 0.4, "--steps", 3)
    told = preset.run(method, "mixed", *words).document["settings"]
    assert (told["optimizer"], told["bound"], told["batch_size"]) == ("ngopt", 0.4, 32)


def test_a_bfloat16_mixture_can_be_cut(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECYCLE_DTYPE", "bfloat16")
    method = METHODS["adamerging"]
    full = preset.run(method, "full", *FOLLOWED).document
    cut = preset.run(method, "cut", *FOLLOWED, "--rank", 11).document
    assert full["settings"]["base_dtype"] == "bfloat16"
    assert 1e-3 < full["max_logit_deviation"] < 0.5
    assert 0.9 < cut["energy_kept"] < 1
    saved = load_file(tmp_path / "full/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_checkpointing_warns_of_nothing(preset: Preset, recwarn: pytest.WarningsRecorder) -> None:
    words = ("--gradient-checkpointing", *FOLLOWED)
    stored = preset.run(METHODS["recycle"], "less", *words)
    usual = preset.run(METHODS["recycle"], "usual", *FOLLOWED).document
    for one, other in zip(stored.document["history"], usual["history"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


# --- options without effect ----------------------------------------------------------------------

POOLED = "POOL/lab/plain POOL/shop/mlp"
LONE = "--target POOL/lab/plain"
SEARCH = f"{POOLED} --method lorahub"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        # A method and the adapters it takes.
        ("--method adamerging", ("--method adamerging needs adapters", "--method lora")),
        (f"{LONE} --method lora", ("trains a LoRA of its own and takes no adapters",)),
        ("--method lora --reinit all", ("takes no adapters",)),
        ("--method rescale", ("takes the target LoRA alone", "--train-target")),
        (f"{LONE} POOL/shop/mlp --method rescale", ("takes the target LoRA alone",)),
        (f"{LONE} POOL/lab/plain", ("also stands among the adapters",)),
        (f"{LONE} --reinit norm", ("--reinit norm redraws the pool's adapters",)),
        ("--train-target --reinit experts", ("redraws the pool's adapters",)),
        # The target LoRA.
        (f"{POOLED} {LONE} --train-target", ("--target and --train-target both give",)),
        ("--method lora --train-target", ("--train-target has no effect with --method lora",)),
        (f"{POOLED} --target-steps 3", ("--target-steps is about the target", "--train-target")),
        (f"{POOLED} --target-lr 0.1", ("--target-lr is about the target",)),
        (f"{POOLED} --target-rank 3", ("--method recycle trains no LoRA", "--target-rank")),
        ("--target-rank 3", ("--target-rank is about the target LoRA", "--rank")),
        ("--method lora --target-steps 3", ("--target-steps is about",)),
        (f"{POOLED} --train-target --target-lr 0", ("--target-lr is 0", "above 0")),
        (f"{POOLED} --train-target --target-steps 0 --target-lr 0.1",
         ("--target-lr has no effect with --target-steps 0",)),
        ("--rank-pattern q_proj=4097", ("--rank-pattern is 'q_proj=4097'", "from 1 to 4096")),
        # The shape of a LoRA where none is trained.
        (f"{POOLED} --alpha 3", ("trains no LoRA, so it has no use for --alpha",)),
        (f"{POOLED} --dropout 0", ("trains no LoRA, so it has no use for --dropout",)),
        (f"{POOLED} --target-module q_proj", ("no use for --target-module",)),
        (f"{POOLED} --rank-pattern q_proj=2", ("no use for --rank-pattern",)),
        (f"{POOLED} --alpha-pattern q_proj=2", ("no use for --alpha-pattern",)),
        (f"{LONE} --method rescale --rslora", ("--method rescale trains no LoRA", "--rslora")),
        # Where coefficients start.
        (f"{POOLED} --init zero --init-from there", ("--init and --init-from both say",)),
        ("--method lora --init-from there", ("--init-from has no effect with --method lora",)),
        (f"{POOLED} --init-from POOL/lab/plain", ("has no readable mixture.safetensors",)),
        (f"{POOLED} --init-from nowhere", ("has no readable mixture.safetensors",)),
        (f"{POOLED} --train-target --init one-hot --activation squared",
         ("from --init one-hot nothing would be learned of the pool",)),
        (f"{POOLED} --init one-hot", ("--init one-hot starts at the target LoRA",)),
        # Parameters of other methods, or that others rule out.
        (f"{POOLED} --new-rank 3", ("--new-rank has no effect with --method recycle", "sd-lora")),
        (f"{POOLED} --distill 0.1", ("--distill has no effect with --method recycle", "sd-lora")),
        (f"{POOLED} --method pi-tuning --optimizer ngopt", ("--optimizer has no effect",)),
        (f"{POOLED} --method pi-tuning --new-rank 0", ("--new-rank is 0", "[1, 4096]")),
        (f"{POOLED} {LONE[:9]}POOL/lab/rslora --method pi-tuning --new-rank 3",
         ("--new-rank has no effect beside a target LoRA",)),
        (f"{POOLED} --train-target --method pi-tuning --new-rank 3", ("beside a target LoRA",)),
        (f"{POOLED} --method sd-lora --reduce-rank --new-rank 3", ("chooses the rank itself",)),
        (f"{POOLED} --method sd-lora --distill 1.1", ("--distill is 1.1", "[0, 1]")),
        (f"{POOLED} --affine", ("--affine has no effect with --activation leaky-relu",)),
        (f"{POOLED} --bound 2", ("--bound has no effect where gradients are followed",)),
        (f"{SEARCH} --optimizer adamw --bound 2", ("--bound has no effect",)),
        (f"{SEARCH} --bound 0", ("--bound is 0", "above 0")),
        (f"{SEARCH} --activation softmax --affine", ("--affine has no effect with --optimizer",)),
        # What gradients alone need.
        (f"{SEARCH} --lr 0.1", ("--lr has no effect with --optimizer ngopt",)),
        (f"{SEARCH} --lr-schedule linear", ("--lr-schedule has no effect with --optimizer ngopt",)),
        (f"{SEARCH} --warmup 0.1", ("--warmup has no effect",)),
        (f"{SEARCH} --weight-decay 0.1", ("--weight-decay has no effect",)),
        (f"{SEARCH} --max-grad-norm 2", ("--max-grad-norm has no effect",)),
        (f"{SEARCH} --eval-every 2", ("--eval-every has no effect",)),
        (f"{SEARCH} --patience 2", ("--patience has no effect",)),
        (f"{SEARCH} --gradient-checkpointing", ("--gradient-checkpointing has no effect",)),
        (f"{SEARCH} --micro-batch 2", ("--micro-batch has no effect",)),
        (f"{POOLED} --optimizer ngopt --lr 0.1", ("--lr has no effect with --optimizer ngopt",)),
        # Numbers.
        (f"{POOLED} --lr inf", ("--lr is inf",)),
        (f"{POOLED} --warmup 1.5", ("--warmup is 1.5", "[0, 1]")),
        (f"{POOLED} --warmup -1e-10", ("--warmup is -1e-10", "[0, 1]")),
        (f"{POOLED} --weight-decay -1", ("--weight-decay is -1", "from 0")),
        (f"{POOLED} --max-grad-norm 0", ("--max-grad-norm is 0", "above 0")),
        (f"{POOLED} --rank 0", ("--rank is '0'", "energy:E")),
        (f"{POOLED} --rank energy:2", ("--rank is 'energy:2'",)),
        ("--rank energy:0.9", ("the rank of a LoRA is a whole number",)),
        ("--rank full", ("the rank of a LoRA is a whole number",)),
        (f"{POOLED} --rows 2", ("2 training rows",)),
        (f"{POOLED} --license mit", ("--license is 'mit'", "its sources")),
        (f"{POOLED} --method arrow --rank 3", ("--rank has no effect with --method arrow",)),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(
    preset: Preset, pool: Path, tmp_path: Path, line: str, said: tuple[str, ...]
) -> None:
    words = line.replace("POOL", str(pool)).split()
    done = preset.recycle("tune", *words, *preset.common, "--out", "new", succeeds=False)
    assert_refused(done, 2, *said)
    assert not any(path.name.startswith((".new", "new")) for path in tmp_path.iterdir())


def test_what_has_an_effect_after_all_is_let_through(preset: Preset, pool: Path) -> None:
    """Small passes matter to the target LoRA that a search begins with."""
    words = (pool / "lab/plain", "--train-target", *SMALL_TARGET, "--method", "lorahub")
    passes = ("--micro-batch", 2, "--gradient-checkpointing", "--steps", 2)
    document = preset.recycle("tune", *words, *passes, *preset.common, "--out", "new", "--json")
    assert document.document["settings"]["optimizer"] == "ngopt"


# --- sums of factors -----------------------------------------------------------------------------


def test_sums_of_factors_follow_gradients_from_another_start(
    preset: Preset, tmp_path: Path
) -> None:
    method = METHODS["lorahub-factors"]
    words = ("--optimizer", "adamw", *FOLLOWED)
    refused = preset.run(method, "mixed", *words, succeeds=False)
    assert_refused(refused, 2, "from --init zero nothing would be learned", "--init equal")
    assert not (tmp_path / "mixed").exists()
    document = preset.run(method, "mixed", *words, "--init", "equal").document
    assert document["best"]["step"] > 0
    assert document["settings"]["init"] == "equal"
    weights = [adapter["coefficient_mean"] for adapter in document["adapters"]]
    assert all(weight != pytest.approx(3**-0.5, abs=1e-4) for weight in weights)


@pytest.mark.parametrize("score", ["input", "grad"])
@pytest.mark.parametrize("level", ["parameter", "module"])
@pytest.mark.parametrize("restore", ["zero", "init"])
def test_all_forms_of_pruning(preset: Preset, score: str, level: str, restore: str) -> None:
    """Half of every tensor, or of all pairs of an adapter and a module, is zero in the end."""
    words = ("--prune", 0.5, "--score", score, "--level", level, "--restore", restore)
    document = preset.run(METHODS["merge-prune"], "mixed", *words, *FOLLOWED).document
    assert document["best"]["step"] > 0
    assert document["max_logit_deviation"] < 1e-5
    kept = [adapter["coefficient_mean"] for adapter in document["adapters"]]
    if restore == "init":
        assert kept == [1, 1, 1]
    elif level == "parameter":
        assert kept == pytest.approx([0.5] * 3, abs=0.01)
    else:
        tensors = load_file(Path(document["path"]) / "mixture.safetensors")
        for kind in ("lora_A", "lora_B"):
            pairs = [one for name, of in tensors.items() if name.startswith(kind) for one in of]
            assert sum(not one.any() for one in pairs) == len(pairs) // 2
