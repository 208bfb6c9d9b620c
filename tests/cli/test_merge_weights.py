"""`--weights` in all its spellings, and what the documents say of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.command import POOL, Recycle, assert_refused
from support.folders import assert_same_update, dense_sum

from recycle_cli.lora.folder import read_adapter, weights_sha256

FEW_STEPS = ("--steps", "3", "--eval-every", "2", "--batch-size", "4")
NAMES = ("lab/plain", "shop/mlp")
WEIGHTS = (2.0, -0.5)


def weights_in(document: dict[str, Any]) -> list[float]:
    """The weights of a merge's document, where it says them twice."""
    weights = [adapter["weight"] for adapter in document["adapters"]]
    assert document["params"]["weights"] == weights
    return weights


def again(recycle: Recycle, document: dict[str, Any], out: str) -> dict[str, Any]:
    """What the command in a document gives, in another folder."""
    program, *words = document["command"]
    assert program == "recycle"
    words[words.index("--out") + 1] = out
    repeated: dict[str, Any] = recycle(*words, "--json").document
    return repeated


def spellings(pool: Path, tmp_path: Path) -> list[str]:
    plain, mlp = (pool / name for name in NAMES)
    (tmp_path / "here").symlink_to(mlp)
    sha256 = weights_sha256(plain)
    return [
        "2,-0.5",
        " 2.0 , -5e-1 ",
        "lab/plain=2,shop/mlp=-0.5",
        "shop/mlp=-0.5, lab/plain=2",
        f"sha256:{sha256[:8]}=2,shop/mlp=-.5",
        f"sha256:{sha256}=2,sha256:{weights_sha256(mlp)[:3]}=-0.5",
    ]


def test_weights_go_by_position_by_id_and_by_hash(
    crawled: Recycle, pico_folder: Path, pool: Path, tmp_path: Path
) -> None:
    expected = dense_sum({pool / n: weight for n, weight in zip(NAMES, WEIGHTS, strict=True)})
    for number, weights in enumerate(spellings(pool, tmp_path)):
        document = crawled(
            "merge", *NAMES, "--base-model", pico_folder, "--method", "linear",
            f"--weights={weights}", "--out", f"merged-{number}", "--json",
        ).document  # fmt: skip
        assert weights_in(document) == list(WEIGHTS), weights
        assert_same_update(tmp_path / f"merged-{number}", expected, 1e-6)


@pytest.mark.parametrize("named", ["{0}=2,{1}=-0.5", "mlp=-0.5,./plain=2", "plain/=2,{1}=-0.5"])
def test_folders_go_by_their_paths_and_names(
    recycle: Recycle, pico_folder: Path, pool: Path, tmp_path: Path, named: str
) -> None:
    (tmp_path / "plain").symlink_to(pool / "lab/plain")
    document = recycle(
        "merge", "plain", pool / "shop/mlp", "--base-model", pico_folder, "--out", "merged",
        f"--weights={named.format('plain', pool / 'shop/mlp')}", "--method", "linear", "--json",
    ).document  # fmt: skip
    assert weights_in(document) == list(WEIGHTS)


def test_the_sum_of_the_weights_can_be_set(
    crawled: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    words = ("merge", *POOL, "--base-model", pico_folder, "--method", "linear", "--json", "--out")
    one = crawled(*words, "one", "--weights=1,2,3,4", "--weights-sum", "1").document
    assert weights_in(one) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    equal = crawled(*words, "equal", "--weights-sum", "2").document
    assert weights_in(equal) == [0.5] * 4
    turned = crawled(*words, "turned", "--weights=1,2,3,4", "--weights-sum=-1").document
    assert weights_in(turned) == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert weights_in(again(crawled, one, "again")) == weights_in(one)


def test_scores_of_a_selection_are_weights(
    crawled: Recycle, pico_folder: Path, pool: Path, task: Path, tmp_path: Path
) -> None:
    selected = crawled("select", "--task", task, "--base-model", pico_folder, "-k", "3", "--json")
    line = ("merge", "-", "--weights", "from:score", "--method", "linear", "--out", "merged")
    document = crawled(*line, "--json", stdin=selected.stdout).document
    scores = [adapter["score"] for adapter in selected.document["adapters"]]
    assert len(set(scores)) > 1
    assert weights_in(document) == scores
    assert document["base_model"] == str(pico_folder)
    names = [adapter["id"] for adapter in document["adapters"]]
    expected = dense_sum({pool / n: score for n, score in zip(names, scores, strict=True)})
    assert_same_update(tmp_path / "merged", expected, 1e-6)
    repeated = again(crawled, document, "again")
    assert (repeated["sha256"], weights_in(repeated)) == (document["sha256"], scores)


@pytest.mark.parametrize("form", [(), ("--into-base", "BASE"), ("--method", "linear")])
def test_the_members_of_a_merge_can_be_merged_again(
    crawled: Recycle, pico_folder: Path, form: Sequence[str]
) -> None:
    words = ("merge", *NAMES, "--base-model", pico_folder, "--weights=2,-0.5", "--json", "--out")
    sizes = [str(pico_folder) if word == "BASE" else word for word in form]
    merged = crawled(*words, "merged", *sizes)
    line = ("merge", "-", "--weights", "from:weight", "--method", "linear", "--json", "--out")
    document = crawled(*line, "again", stdin=merged.stdout).document
    assert document["adapters"] == merged.document["adapters"]
    assert weights_in(document) == list(WEIGHTS)
    direct = crawled(*words, "direct", "--method", "linear").document
    assert document["sha256"] == direct["sha256"]
    # Without from:weight the result itself is what comes through the pipe.
    if "--into-base" not in form:
        whole = crawled("merge", "-", "--out", "whole", "--json", stdin=merged.stdout).document
        assert [adapter["sha256"] for adapter in whole["adapters"]] == [merged.document["sha256"]]


def test_the_members_of_a_mixture_can_be_merged_by_their_coefficients(
    crawled: Recycle, pico_folder: Path, pool: Path, task: Path, tmp_path: Path
) -> None:
    tuned = crawled(
        "tune", "lab/plain", "shop/mlp", "--target", "lab/rslora", "--task", task, "--base-model",
        pico_folder, *FEW_STEPS, "--out", "mixed", "--json",
    )  # fmt: skip
    line = ("merge", "-", "--weights", "from:coefficient", "--method", "linear", "--out", "flat")
    document = crawled(*line, "--json", stdin=tuned.stdout).document
    means = {a["id"]: a["coefficient_mean"] for a in tuned.document["adapters"]}
    assert {a["id"]: a["weight"] for a in document["adapters"]} == means
    assert set(means) == {"lab/plain", "shop/mlp", "lab/rslora"}
    expected = dense_sum({pool / name: mean for name, mean in means.items()})
    assert_same_update(tmp_path / "flat", expected, 1e-6)


def test_a_mixture_is_exported_again_at_a_lower_rank(
    crawled: Recycle, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    crawled(
        "tune", "lab/plain", "lab/rslora", "--task", task, "--base-model", pico_folder, *FEW_STEPS,
        "--out", "mixed",
    )  # fmt: skip
    words = ("merge", "mixed", "--base-model", pico_folder, "--json", "--out")
    whole = crawled(*words, "whole").document
    assert_same_update(tmp_path / "whole", dense_sum({tmp_path / "mixed": 1.0}), 1e-6)
    low = crawled(*words, "low", "--rank", "2").document
    assert {p.rank for p in read_adapter(tmp_path / "low").update.values()} == {2}
    assert 0 < low["energy_kept"] < whole["energy_kept"] == 1


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--weights=0.1,-1e-07,3,0.30000000000000004 --method linear",
        "--method ties --density .35 --normalize weights --weights=1,2,3,4 --rank energy:.6"
        " --uniform",
        "--method della --density 0.6 --epsilon 0.2 --seed 7 --save-dtype bfloat16",
        "--method tsv --components 2 --absent skip",
        "--method core-space --inner linear --rank energy:0.8",
        "--method lora-lego --clusters 3 --seed 1",
        "--method compress-then-merge --shared-rank 2 --into-base BASE --check",
    ],
)
def test_the_command_in_the_document_gives_the_same_again(
    crawled: Recycle, pico_folder: Path, words: str
) -> None:
    given = words.replace("BASE", str(pico_folder)).split()
    line = ("merge", *POOL, "--base-model", pico_folder, *given, "--out", "merged", "--json")
    document = crawled(*line).document
    repeated = again(crawled, document, "again")
    assert repeated["sha256"] == document["sha256"]
    assert repeated["params"] == document["params"]
    assert repeated["form"] == document["form"]
    assert repeated["max_logit_deviation"] == document["max_logit_deviation"]


LINEAR = "--method linear"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--weights=1", ("1 numbers for 2 adapters", "ID=NUMBER")),
        ("--weights=1,2,3", ("3 numbers for 2 adapters",)),
        ("--weights=", ("--weights is ''", "--weights 1,0.5")),
        ("--weights=1,,2", ("--weights is '1,,2'",)),
        ("--weights=1;2", ("--weights is '1;2'",)),
        ("--weights=1,1e999", ("--weights is '1,1e999'",)),
        ("--weights=plain=1,nosuch=2", ("names 'nosuch', which is none", "plain, mlp")),
        ("--weights=plain=1,lab/plain=2", ("names 'lab/plain', which is none", "plain, mlp")),
        ("--weights=plain=1,plain=2", ("--weights is 'plain=1,plain=2'", "each adapter once")),
        ("--weights=plain=1", ("no number for mlp", "name every adapter")),
        ("--weights=plain=1,2", ("--weights is 'plain=1,2'", "name each adapter once")),
        ("--weights=plain=1,=2", ("--weights is 'plain=1,=2'",)),
        ("--weights=plain=1,mlp=two", ("mlp=two",)),
        ("--weights=plain=1,mlp=nan", ("mlp=nan",)),
        ("--weights=sha256:=1,mlp=1", ("'sha256:'",)),
        ("--weights=sha256:zz=1,mlp=1", ("'sha256:zz', which is none",)),
        ("--weights=from:nonsense", ("'from:nonsense'", "from:score", "from:coefficient")),
        ("--weights=from:", ("'from:'", "from:weight")),
        ("--weights=from:score", ("no score for plain, mlp", "pipe in a selection")),
        ("--weights=from:weight", ("no weight for plain, mlp",)),
        (f"{LINEAR} --weights=1,-1 --weights-sum 1", ("sum to 0", "--weights-sum 1")),
        ("--weights=1,-1", ("sums to 0", "--method linear")),
        ("--weights=0,0 --method factor-average", ("sums to 0",)),
        ("--weights=1,2 --method sce", ("no effect with --method sce", "leave it out")),
        ("--weights=1,2 --method lora-lego", ("no effect with --method lora-lego",)),
        ("--weights-sum 2 --method sce", ("--weights-sum has no effect with --method sce",)),
        ("--weights-sum 2", ("--weights-sum has no effect with --method average",)),
        ("--weights=-1,2 --method slerp", ("holds -1", "none below 0", "use weights from 0")),
        ("--weights=1,-2 --method karcher", ("holds -2",)),
        (f"{LINEAR} --weights-sum nan", ("--weights-sum is nan",)),
        (f"{LINEAR} --weights-sum=-inf", ("--weights-sum is -inf",)),
        (f"{LINEAR} --weights=1e300,1", ("too large for float32", "smaller weights")),
        (f"{LINEAR} --weights=1e300,1 --rank 1", ("too large for float32",)),
        (f"{LINEAR} --weights=1e9,1 --save-dtype float16", ("too large for float16",)),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    recycle: Recycle, pico_folder: Path, pool: Path, tmp_path: Path, words: str, said: Any
) -> None:
    adapters = [pool / name for name in NAMES]
    line = ("merge", *adapters, "--base-model", pico_folder, *words.split(), "--out", "merged")
    done = recycle(*line, succeeds=False)
    assert not (tmp_path / "merged").exists()
    assert_refused(done, 2, *said)


def test_weights_that_cancel_up_to_rounding_are_refused(
    crawled: Recycle, pico_folder: Path
) -> None:
    assert 0 < abs(sum((0.1, 0.2, -0.3))) < 1e-15
    words = ("merge", *list(POOL)[:3], "--base-model", pico_folder, "--out", "merged")
    done = crawled(*words, "--weights=0.1,0.2,-0.3", succeeds=False)
    assert_refused(done, 2, "sums to 0")


@pytest.mark.parametrize(
    ("field", "command"),
    [
        ("score", "merge lab/plain shop/mlp --base-model BASE --out piped"),
        ("weight", "select --method random -k 2 --base-model BASE"),
        ("coefficient", "merge lab/plain shop/mlp --base-model BASE --out piped"),
        ("score", "crawl POOL --base-model BASE"),
    ],
)
def test_documents_without_the_field_are_refused(
    crawled: Recycle, pico_folder: Path, pool: Path, tmp_path: Path, field: str, command: str
) -> None:
    places = {"BASE": pico_folder, "POOL": pool}
    piped = crawled(*(places.get(word, word) for word in command.split()), "--json")
    line = ("merge", "-", "--weights", f"from:{field}", "--out", "merged")
    done = crawled(*line, stdin=piped.stdout, succeeds=False)
    assert_refused(done, 2, f"the input has no {field} for", f"for from:{field}")
    assert not (tmp_path / "merged").exists()
