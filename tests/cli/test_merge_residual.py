"""`recycle merge --method fedex --as adapter+residual`: an exact mean in two parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import write_peft_adapter
from support.command import Recycle, assert_refused
from support.folders import (
    Dense,
    added_by_peft,
    assert_same_update,
    dense_sum,
    read_json,
    weights_of,
)

from recycle_cli.lora.folder import read_adapter

WEIGHTS = (1.0, 0.5, 2.5)
SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]
FEDEX = ("--method", "fedex", "--as", "adapter+residual")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "recycle.json"]
RESIDUAL_FILES = ["residual/adapter_config.json", "residual/adapter_model.safetensors"]


@pytest.fixture(scope="module")
def team(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 4, of one scale each; the last one lacks a module."""
    place = tmp_path_factory.mktemp("team")
    configs: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3},
        {"target_modules": ["q_proj"], "use_rslora": True},
    ]
    return [
        write_peft_adapter(place / name, pico_folder, 40 + seed, **config)
        for seed, (name, config) in enumerate(zip(("one", "two", "three"), configs, strict=True))
    ]


def merge(recycle: Recycle, team: list[Path], base: Path, *words: str, out: str = "merged") -> Any:
    weights = "--weights=" + ",".join(map(str, WEIGHTS))
    line = ("merge", *team, "--base-model", base, weights, *words, "--out", out, "--json")
    return recycle(*line).document


def both(base: Path, folder: Path) -> Dense:
    """What the adapter and its residual add together, as PEFT loads them."""
    parts = [added_by_peft(base, folder), added_by_peft(base, folder / "residual")]
    return {m: sum(part[m] for part in parts if m in part) for m in parts[0] | parts[1]}


def test_adapter_and_residual_together_are_the_exact_mean(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    document = merge(recycle, team, pico_folder, *FEDEX)
    merge(recycle, team, pico_folder, "--method", "average", out="average")
    found = both(pico_folder, tmp_path / "merged")
    expected = dense_sum(dict(zip(team, SHARES, strict=True)))
    assert found.keys() == expected.keys()
    average = added_by_peft(pico_folder, tmp_path / "average")
    for module, dense in expected.items():
        np.testing.assert_allclose(found[module], dense.numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[module], average[module], rtol=0, atol=1e-6)
    assert (document["form"], document["rank"], document["energy_kept"]) == (
        "adapter+residual",
        4,
        1,
    )
    assert document["files"] == sorted(FILES + RESIDUAL_FILES)
    card = (tmp_path / "merged/README.md").read_text()
    assert "`residual/` holds what this adapter lacks" in card


def test_the_adapter_is_the_average_of_the_factors(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    merge(recycle, team, pico_folder, *FEDEX)
    merge(recycle, team, pico_folder, "--method", "factor-average", out="factors")
    weights = "adapter_model.safetensors"
    found = (tmp_path / "merged" / weights).read_bytes()
    assert found == (tmp_path / "factors" / weights).read_bytes()
    sources = [read_adapter(folder).update for folder in team]
    module = "model.layers.0.self_attn.q_proj"
    pieces = [source[module].to(torch.float64) for source in sources]
    a = sum(share * piece.A for share, piece in zip(SHARES, pieces, strict=True))
    b = sum(share * piece.scale * piece.B for share, piece in zip(SHARES, pieces, strict=True))
    expected = (b @ a).numpy()
    np.testing.assert_allclose(
        added_by_peft(pico_folder, tmp_path / "merged")[module], expected, rtol=0, atol=1e-6
    )


def test_as_one_adapter_it_is_the_average(
    recycle: Recycle, team: list[Path], pico_folder: Path
) -> None:
    one = merge(recycle, team, pico_folder, "--method", "fedex")
    other = merge(recycle, team, pico_folder, "--method", "average", out="average")
    assert (one["form"], one["sha256"]) == ("adapter", other["sha256"])


def test_the_rank_limits_the_residual_alone(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    merge(recycle, team, pico_folder, *FEDEX, out="whole")
    document = merge(recycle, team, pico_folder, *FEDEX, "--rank", "2")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "merged" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()
    residual = read_adapter(tmp_path / "merged/residual").update
    assert {piece.rank for piece in residual.values()} == {2}
    squares = {
        module: np.linalg.svd(dense.numpy(), compute_uv=False) ** 2
        for module, dense in dense_sum({tmp_path / "whole/residual": 1.0}).items()
    }
    assert document["rank"] == 4
    assert document["energy_by_module"] == pytest.approx(
        {module: energy[:2].sum() / energy.sum() for module, energy in squares.items()}, abs=1e-5
    )
    kept = sum(energy[:2].sum() for energy in squares.values())
    whole = sum(energy.sum() for energy in squares.values())
    assert document["energy_kept"] == pytest.approx(kept / whole, abs=1e-5)


def test_uniform_fills_up_both_parts(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    merge(recycle, team, pico_folder, *FEDEX, "--rank", "energy:0.9", out="as-it-is")
    merge(recycle, team, pico_folder, *FEDEX, "--rank", "energy:0.9", "--uniform")
    for part in ("", "residual"):
        assert read_json(tmp_path / "merged" / part / "adapter_config.json")["rank_pattern"] == {}
        expected = dense_sum({tmp_path / "as-it-is" / part: 1.0})
        assert_same_update(tmp_path / "merged" / part, expected, 0)


def test_the_residual_goes_into_the_base_and_the_adapter_on_top(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    merge(recycle, team, pico_folder, *FEDEX)
    recycle("merge", "merged/residual", "--into-base", pico_folder, "--out", "base")
    recycle("merge", "merged", "--into-base", "base", "--out", "whole")
    before, after = weights_of(pico_folder), weights_of(tmp_path / "whole")
    for module, dense in dense_sum(dict(zip(team, SHARES, strict=True))).items():
        added = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        assert torch.allclose(added, dense, rtol=0, atol=1e-5), module


def test_force_replaces_the_folder_with_its_residual(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    first = merge(recycle, team, pico_folder, *FEDEX)
    second = merge(recycle, team, pico_folder, *FEDEX, "--rank", "1", "--force")
    assert second["files"] == first["files"]
    ranks = {p.rank for p in read_adapter(tmp_path / "merged/residual").update.values()}
    assert ranks == {1}
    merge(recycle, team, pico_folder, "--method", "fedex", "--force")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_leaves_a_residual_alone_that_holds_more(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    merge(recycle, team, pico_folder, *FEDEX)
    mine = tmp_path / "merged/residual/mine.txt"
    mine.write_text("keep me")
    line = ("merge", *team, "--base-model", pico_folder, "--out", "merged", "--force")
    assert_refused(recycle(*line, succeeds=False), 2, "leaves it alone")
    assert mine.read_text() == "keep me"


def test_of_one_adapter_nothing_is_left_over(
    recycle: Recycle, team: list[Path], pico_folder: Path, tmp_path: Path
) -> None:
    words = ("merge", team[0], "--base-model", pico_folder, *FEDEX, "--out", "merged")
    recycle(*words)
    assert_same_update(tmp_path / "merged", dense_sum({team[0]: 1.0}), 1e-6)
    assert not any(dense.any() for dense in dense_sum({tmp_path / "merged/residual": 1}).values())
