"""What `recycle merge` writes, as PEFT and numpy see it."""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.adapters import write_peft_adapter
from support.command import POOL, Recycle
from support.folders import Dense, added_by_peft, assert_same_update, dense_sum, read_json

from recycle_cli.lora.folder import read_adapter
from recycle_cli.merging.catalog import METHODS, MergeMethod

MIXED = ("lab/plain", "lab/rslora", "shop/mlp")
TEAM = ("one", "two", "three")
ORDERS = list(itertools.permutations(range(3)))


@pytest.fixture(scope="module")
def team(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of one rank and the same modules, one of them taller than wide."""
    place = tmp_path_factory.mktemp("team")
    modules = ["q_proj", "v_proj", "down_proj"]
    return [
        write_peft_adapter(place / name, pico_folder, 30 + seed, target_modules=modules)
        for seed, name in enumerate(TEAM)
    ]


@pytest.fixture
def mean(pool: Path) -> Dense:
    """The mean of the adapters of different ranks, multiplied out."""
    weights = {pool / name: 1 / len(MIXED) for name in MIXED}
    return {module: dense.numpy() for module, dense in dense_sum(weights).items()}


def assert_close(found: Dense, expected: Dense, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for module, dense in expected.items():
        size = max(1.0, float(np.abs(dense).max()))
        np.testing.assert_allclose(
            found[module], dense, rtol=0, atol=tolerance * size, err_msg=module
        )


def cut(dense: Dense, counts: Mapping[str, int]) -> Dense:
    """The best approximation of each module at its rank."""
    result = {}
    for module, whole in dense.items():
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        count = counts[module]
        result[module] = (left[:, :count] * values[:count]) @ right[:count]
    return result


def squares(dense: Dense) -> dict[str, np.ndarray]:
    return {m: np.linalg.svd(whole, compute_uv=False) ** 2 for m, whole in dense.items()}


def ranks_in(folder: Path) -> dict[str, int]:
    return {module: piece.rank for module, piece in read_adapter(folder).update.items()}


def test_at_full_rank_adapters_of_any_ranks_are_merged_exactly(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense
) -> None:
    words = ("merge", *MIXED, "--base-model", pico_folder, "--out", "merged", "--json")
    document = crawled(*words).document
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), mean)
    assert (document["rank"], document["energy_kept"], document["energy_by_module"]) == (12, 1, {})
    expected = {"q_proj": 12, "v_proj": 12, "k_proj": 8, "o_proj": 8}
    for module, rank in ranks_in(tmp_path / "merged").items():
        assert rank == expected.get(module.rpartition(".")[2], 2), module
    config = read_json(tmp_path / "merged/adapter_config.json")
    odd = {m: rank for m, rank in ranks_in(tmp_path / "merged").items() if rank != config["r"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == odd
    assert len(odd) == 8


def test_a_number_limits_the_rank_and_keeps_the_most_there_is(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense
) -> None:
    document = crawled(
        "merge", *MIXED, "--base-model", pico_folder, "--rank", "5", "--out", "merged", "--json"
    ).document
    counts = {module: min(5, rank) for module, rank in ranks_in(tmp_path / "merged").items()}
    assert set(counts.values()) == {5, 2}
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), cut(mean, counts))
    energies = squares(mean)
    expected = {m: e[: counts[m]].sum() / e.sum() for m, e in energies.items()}
    lossy = {m: share for m, share in expected.items() if counts[m] == 5}
    assert document["energy_by_module"] == pytest.approx(lossy)
    kept = sum(e[: counts[m]].sum() for m, e in energies.items())
    whole = sum(e.sum() for e in energies.values())
    assert document["energy_kept"] == pytest.approx(kept / whole)
    low = [share for share in lossy.values() if share < 0.9]
    (warning,) = (w for w in document["warnings"] if "rank limit" in w)
    assert f"{len(low)} of {len(expected)} modules" in warning
    assert f"the least {min(low):.1%}" in warning
    card = (tmp_path / "merged/README.md").read_text()
    assert f"| {max(lossy)} | {lossy[max(lossy)]:.4f} |" in card


@pytest.mark.parametrize("rank", ["4", "energy:0.9"])
def test_singular_values_are_shared_evenly_by_the_factors(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense, rank: str
) -> None:
    crawled("merge", *MIXED, "--base-model", pico_folder, "--rank", rank, "--out", "merged")
    for module, piece in read_adapter(tmp_path / "merged").update.items():
        assert piece.scale == 1
        a, b = piece.A.double().numpy(), piece.B.double().numpy()
        values = np.diag(np.sqrt(squares(mean)[module])[: piece.rank])
        np.testing.assert_allclose(a @ a.T, values, rtol=0, atol=1e-5, err_msg=module)
        np.testing.assert_allclose(b.T @ b, values, rtol=0, atol=1e-5, err_msg=module)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_keeps_the_fewest_directions_that_hold_the_share(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense, share: float
) -> None:
    document = crawled(
        "merge", *MIXED, "--base-model", pico_folder, "--rank", f"energy:{share}", "--out",
        "merged", "--json",
    ).document  # fmt: skip
    counts = {
        module: int(np.searchsorted(np.cumsum(energy) / energy.sum(), share) + 1)
        for module, energy in squares(mean).items()
    }
    assert ranks_in(tmp_path / "merged") == counts
    assert document["rank"] == max(counts.values())
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), cut(mean, counts))
    assert min(document["energy_by_module"].values()) >= share
    assert document["energy_kept"] >= share
    assert any("rank limit keeps" in warning for warning in document["warnings"]) == (share < 0.9)
    config = read_json(tmp_path / "merged/adapter_config.json")
    assert config["rank_pattern"].items() >= {
        (module, rank) for module, rank in counts.items() if rank != config["r"]
    }


def test_a_limit_above_all_ranks_limits_nothing_and_is_said(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense
) -> None:
    document = crawled(
        "merge", *MIXED, "--base-model", pico_folder, "--rank", "4000", "--out", "merged", "--json"
    ).document
    assert document["rank"] == 12
    assert document["energy_kept"] == 1
    (warning,) = (w for w in document["warnings"] if w.startswith("--rank"))
    assert warning == "--rank 4000 is more than there is: no module has more than 12."
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), mean)


@pytest.mark.parametrize("rank", ["full", "5", "energy:0.9"])
def test_uniform_gives_one_rank_and_exactly_the_same_product(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, rank: str
) -> None:
    words = ("merge", *MIXED, "--base-model", pico_folder, "--rank", rank, "--json", "--out")
    as_it_is = crawled(*words, "plain").document
    document = crawled(*words, "uniform", "--uniform").document
    assert set(ranks_in(tmp_path / "uniform").values()) == {document["rank"]} == {as_it_is["rank"]}
    config = read_json(tmp_path / "uniform/adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (document["rank"], document["rank"])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert_same_update(tmp_path / "uniform", dense_sum({tmp_path / "plain": 1.0}), 0)
    found = added_by_peft(pico_folder, tmp_path / "uniform")
    assert_close(found, added_by_peft(pico_folder, tmp_path / "plain"), 1e-12)


FLAGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 6},
    "rank_pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 7, "v_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 50}},
    "patterns": {
        "use_rslora": True,
        # In the order of their names, in which PEFT saves them: the first that fits counts.
        "rank_pattern": {"layers.1.self_attn.v_proj": 9, "v_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 1, "v_proj": 3},
    },
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "regex": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "layers": {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_an_adapter_is_read_as_peft_reads_it(
    recycle: Recycle, pico_folder: Path, tmp_path: Path, flags: dict[str, Any], bfloat16: bool
) -> None:
    original = write_peft_adapter(tmp_path / "original", pico_folder, 12, **flags)
    if bfloat16:
        file = original / "adapter_model.safetensors"
        halves = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    words = ("merge", "original", "--base-model", pico_folder, "--method", "linear")
    recycle(*words, "--out", "merged")
    expected = added_by_peft(pico_folder, original)
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), expected)


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16"])
def test_a_coarser_dtype_on_disk_costs_its_rounding(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, mean: Dense, save_dtype: str
) -> None:
    words = ("merge", *MIXED, "--base-model", pico_folder, "--save-dtype", save_dtype)
    crawled(*words, "--out", "merged")
    tensors = load_file(tmp_path / "merged/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{save_dtype}"}
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), mean, 2e-2)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_gives_an_adapter_that_peft_loads(
    recycle: Recycle, pico_folder: Path, tmp_path: Path, team: list[Path], method: MergeMethod
) -> None:
    document = recycle(
        "merge", *team[:2], "--base-model", pico_folder, "--method", method.name, "--out",
        "merged", "--json",
    ).document  # fmt: skip
    update = read_adapter(tmp_path / "merged").update
    found = {m: piece.to(piece.A.double().dtype).dense().numpy() for m, piece in update.items()}
    assert len(found) == 6
    assert_close(added_by_peft(pico_folder, tmp_path / "merged"), found, 1e-12)
    assert document["method"] == method.name
    assert document["params"].items() >= method.defaults.items()
    assert document["rank"] == max(piece.rank for piece in update.values())
    for module, dense in found.items():
        rank = np.linalg.matrix_rank(dense, tol=1e-6 * np.linalg.norm(dense, 2))
        if method.name in {"ties", "sce", "tsv", "iso", "lora-lego", "della", "magnitude-prune"}:
            assert rank == update[module].rank, "no direction is written that is not there"


def test_a_dense_rule_finds_the_low_rank_that_there_is(
    recycle: Recycle, pico_folder: Path, tmp_path: Path, team: list[Path]
) -> None:
    words = ("merge", team[0], "--base-model", pico_folder, "--method", "ties", "--density", "1")
    document = recycle(*words, "--out", "merged", "--json").document
    assert document["rank"] == 4
    assert set(ranks_in(tmp_path / "merged").values()) == {4}
    assert_same_update(tmp_path / "merged", dense_sum({team[0]: 1.0}), 1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_same_adapters_in_any_order_give_the_same_bytes(
    recycle: Recycle, pico_folder: Path, tmp_path: Path, team: list[Path], method: MergeMethod
) -> None:
    count = method.most_adapters or 3
    weights = (0.3, 1.1, 0.7)[:count]
    orders = [order[:count] for order in ORDERS if max(order[:count]) < count]
    written = set()
    for number, order in enumerate([*orders[:4], orders[0]]):
        words = [str(team[at]) for at in order]
        if method.weights != "none":
            words.append("--weights=" + ",".join(str(weights[at]) for at in order))
        recycle(
            "merge", *words, "--base-model", pico_folder, "--method", method.name, "--seed", "3",
            "--out", f"merged-{number}",
        )  # fmt: skip
        folder = tmp_path / f"merged-{number}"
        written.add(
            tuple(
                (folder / name).read_bytes()
                for name in ("adapter_model.safetensors", "adapter_config.json")
            )
        )
    assert len(written) == 1


@pytest.mark.parametrize(
    "words",
    ["dare-linear", "dare-ties", "della", "knots-dare", "core-space --inner dare --density 0.5"],
)
def test_another_seed_draws_other_entries(
    recycle: Recycle, pico_folder: Path, team: list[Path], words: str
) -> None:
    line = ("merge", *team, "--base-model", pico_folder, "--json", "--method", *words.split())
    seeds = ("0", "0", "1")
    documents = [
        recycle(*line, "--seed", seed, "--out", f"merged-{number}").document
        for number, seed in enumerate(seeds)
    ]
    first, again, other = (document["sha256"] for document in documents)
    assert first == again
    assert first != other
    assert [document["seed"] for document in documents] == [0, 0, 1]


def test_absent_modules_count_as_zero_or_not_at_all(
    crawled: Recycle, pico_folder: Path, pool: Path, tmp_path: Path
) -> None:
    words = ("merge", "lab/plain", "shop/mlp", "--base-model", pico_folder, "--out")
    crawled(*words, "zero")
    crawled(*words, "skip", "--absent", "skip")
    plain, mlp = pool / "lab/plain", pool / "shop/mlp"
    assert_same_update(tmp_path / "zero", dense_sum({plain: 0.5, mlp: 0.5}), 1e-6)
    assert_same_update(tmp_path / "skip", dense_sum({plain: 1.0, mlp: 1.0}), 1e-6)


def test_without_base_only_the_adapters_are_read(
    crawled: Recycle, pico_folder: Path, pool: Path, tmp_path: Path
) -> None:
    words = ("merge", pool / "lab/plain", "--base-model", "org/nowhere-to-be-found", "--json")
    document = crawled("--offline", *words, "--out", "merged").document
    assert document["base_model"] == "org/nowhere-to-be-found"
    config = read_json(tmp_path / "merged/adapter_config.json")
    assert config["base_model_name_or_path"] == "org/nowhere-to-be-found"


def test_the_document_lists_the_files_and_is_the_record(
    crawled: Recycle, pico_folder: Path, tmp_path: Path
) -> None:
    words = ("merge", *POOL, "--base-model", pico_folder, "--out", "merged", "--json")
    done = crawled(*words)
    there = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert done.document["files"] == there
    assert done.stdout == (tmp_path / "merged/recycle.json").read_text()
    assert done.document["licenses"] == ["apache-2.0", "mit"]


@pytest.mark.parametrize(
    ("names", "license"),
    [
        (["lab/plain"], "mit"),
        (["lab/plain", "lab/rslora"], ["apache-2.0", "mit"]),
        (["lab/plain", "shop/patterned"], None),
    ],
)
def test_the_card_states_the_licences_of_all_sources(
    crawled: Recycle, pico_folder: Path, tmp_path: Path, names: list[str], license: Any
) -> None:
    crawled("merge", *names, "--base-model", pico_folder, "--out", "merged")
    _, front, text = (tmp_path / "merged/README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields.get("license") == license
    assert fields["base_model"] == str(pico_folder)
    assert (fields["library_name"], fields["tags"][:2]) == ("peft", ["lora", "recycle"])
    assert all(name in text for name in names)


def test_a_merge_of_merges_keeps_their_licences_apart(
    recycle: Recycle, pico_folder: Path, team: list[Path], tmp_path: Path
) -> None:
    names = [shutil.copytree(folder, tmp_path / folder.name).name for folder in team]
    for name, license in zip(names, ("apache-2.0", "gpl-3.0", "apache-2.0"), strict=True):
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    words = ("--base-model", pico_folder, "--json", "--out")
    first = recycle("merge", *names[:2], *words, "first").document
    second = recycle("merge", "first", names[2], *words, "second").document
    assert second["licenses"] == first["licenses"] == ["apache-2.0", "gpl-3.0"]
    assert any("same licence: gpl-3.0" in warning for warning in first["warnings"])
    assert second["warnings"] == first["warnings"]


def test_the_methods_are_listed_for_people_and_for_programs(recycle: Recycle) -> None:
    shown = recycle("merge", "--list").stdout
    documents = recycle("merge", "--list", "--json").documents
    assert [document["name"] for document in documents] == list(METHODS)
    assert {document["schema"] for document in documents} == {"recycle.method/1"}
    for document in documents:
        assert document["name"] in shown
        assert document["formula"]
        assert {p["name"] for p in document["parameters"]} == set(
            METHODS[document["name"]].defaults
        )
        assert all(p["option"] in shown for p in document["parameters"])
