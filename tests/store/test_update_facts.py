import math
import weakref
from pathlib import Path

import pytest
import torch
from support.low_rank import random_piece

from recycle_cli.lora.fingerprint import project
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.norm import fingerprint, module_norms, total_norm
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.store.evidence import FolderEvidence
from recycle_cli.store.factors import FactorsFile
from recycle_cli.store.folder import FoundFolder
from recycle_cli.store.update_facts import facts_of


def written(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    update = {f"layers.{n}.q_proj": random_piece(n, n + 1, (5, 4), 0.5) for n in range(3)}
    write_adapter(folder, update, "org/base", dtype)
    return folder


def evidence_of(folder: Path) -> FolderEvidence:
    return FolderEvidence(FoundFolder("a", folder, folder))


def test_the_facts_are_those_of_the_whole_update(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    update, evidence = read_adapter(folder).update, evidence_of(folder)
    norms = module_norms(update)
    ranks = {module: piece.rank for module, piece in update.items()}
    assert {module: facts.norm for module, facts in evidence.modules.items()} == norms
    assert {module: facts.rank for module, facts in evidence.modules.items()} == ranks
    projections = {module: facts.projection for module, facts in evidence.modules.items()}
    assert projections == project(update)
    assert evidence.norm == total_norm(norms)
    assert evidence.fingerprint == fingerprint(ranks, norms)


def test_no_more_than_one_module_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = evidence_of(written(tmp_path / "a"))
    read, alive = FactorsFile.read, list[weakref.ref[LowRankUpdate]]()

    def watched(file: FactorsFile, module: str) -> LowRankUpdate:
        assert all(one() is None for one in alive)
        piece = read(file, module)
        alive.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(FactorsFile, "read", watched)
    assert evidence.norm > 0
    assert len(alive) == len(evidence.pairs) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = written(tmp_path / "a", dtype)
    evidence, update = evidence_of(folder), read_adapter(folder).update
    file = FactorsFile(evidence.weights_path, evidence.pairs, evidence.config)
    for module, piece in update.items():
        mine = file.read(module)
        assert torch.equal(mine.A, piece.A)
        assert torch.equal(mine.B, piece.B)
        assert mine.scale == piece.scale
    file.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_no_number_has_no_facts(bad: float, factor: str) -> None:
    piece = random_piece(0, 2, (4, 3))
    getattr(piece, factor)[1, 1] = bad
    assert facts_of({"good": random_piece(1, 2, (4, 3)), "bad": piece}) is None


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    evidence = evidence_of(written(tmp_path / "a"))
    assert evidence.pairs
    content = evidence.weights_path.read_bytes()
    evidence.weights_path.write_bytes(content[:-4])
    with pytest.raises(OSError, match="became shorter"):
        _ = evidence.norm
