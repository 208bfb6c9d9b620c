import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.folder import read_adapter, read_config, weights_sha256
from recycle_cli.records import AdapterDocument, CrawlDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest

SHAPES = {"layers.0.q_proj": (6, 6), "layers.0.v_proj": (3, 6)}


def put_adapter(folder: Path, seed: int = 0, rank: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        prefix = f"base_model.model.{module}.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{prefix}B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Bench:
    """A pool on disk, a home, and a way to crawl the one into the other."""

    def __init__(self, folder: Path) -> None:
        self.pool = folder / "pool"
        self.settings = Settings(folder / "home")
        self.request = CrawlRequest(self.pool, "org/base")
        self.summary: CrawlDocument | None = None

    def crawl(self, **changes: Any) -> dict[str, AdapterDocument]:
        *documents, summary = crawl(replace(self.request, **changes), self.settings, SHAPES)
        assert isinstance(summary, CrawlDocument)
        self.summary = summary
        adapters = [one for one in documents if isinstance(one, AdapterDocument)]
        assert len(adapters) == len(documents)
        return {document.id: document for document in adapters}

    def verdicts(self, **changes: Any) -> dict[str, str]:
        return {name: one.reason or one.status for name, one in self.crawl(**changes).items()}

    def bytes_read(self) -> int:
        assert self.summary is not None
        return self.summary.bytes

    def recorded(self) -> dict[str, str]:
        with Catalog(self.settings.catalog_file) as catalog:
            rows = catalog.query(AdapterQuery(status=None))
        return {row.id: row.reason or row.status for row in rows}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_mixed_pool(bench: Bench) -> None:
    put_adapter(bench.pool / "a", 1)
    put_adapter(bench.pool / "b", 1)
    put_adapter(bench.pool / "c", 2, use_dora=True)
    put_adapter(bench.pool / "d", 3)
    (bench.pool / "d" / "adapter_config.json").unlink()
    (bench.pool / "d" / "adapter_config.json").symlink_to("adapter_config.json")
    put_adapter(bench.pool / "e", 4)

    verdicts = bench.verdicts()

    assert (
        verdicts
        == {
            "a": "accepted",
            "b": "duplicate",
            "c": "dora",
            "d": "link_outside",
            "e": "accepted",
        }
        or verdicts["d"] == "unreadable"
    )
    assert bench.recorded() == verdicts
    summary = bench.summary
    assert summary is not None
    assert summary.counts == {"accepted": 2, "rejected": 2, "failed": 1}
    assert summary.reasons == {"duplicate": 1, "dora": 1, "unreadable": 1}
    assert summary.requests == 0
    size = (bench.pool / "a" / "adapter_model.safetensors").stat().st_size
    assert summary.bytes == 3 * size


def test_an_accepted_adapter_is_kept_as_it_is(bench: Bench) -> None:
    original = put_adapter(bench.pool / "a")
    document = bench.crawl()["a"]
    assert document.path is not None
    kept = Path(document.path)
    assert kept == bench.settings.adapters_folder / weights_sha256(original)
    assert document.sha256 == weights_sha256(kept)
    for module, update in read_adapter(original).update.items():
        assert torch.equal(read_adapter(kept).update[module].dense(), update.dense())
    norm = sum(float(u.dense().norm() ** 2) for u in read_adapter(kept).update.values()) ** 0.5
    assert document.norm == pytest.approx(norm, rel=1e-5)
    assert document.size_bytes == (kept / "adapter_model.safetensors").stat().st_size


def test_documents_come_as_they_are_done(bench: Bench) -> None:
    put_adapter(bench.pool / "a", 1)
    put_adapter(bench.pool / "b", 2)
    stream = crawl(bench.request, bench.settings, SHAPES)
    assert getattr(next(stream), "id", None) == "a"
    assert bench.recorded() == {"a": "accepted"}
    stream.close()  # type: ignore[attr-defined]
    assert bench.verdicts() == {"a": "accepted", "b": "accepted"}


def test_folders_whose_names_look_alike_are_two(bench: Bench) -> None:
    for seed, name in enumerate(("a\x01", "a\x02", "a\ufffd"), 1):
        put_adapter(bench.pool / name, seed)
    *documents, summary = crawl(bench.request, bench.settings, SHAPES)
    assert isinstance(summary, CrawlDocument)
    assert summary.counts == {"accepted": 3}
    with Catalog(bench.settings.catalog_file) as catalog:
        assert len(catalog.query(AdapterQuery())) == 3
    assert all(Path(one.path or "").is_dir() for one in documents)  # type: ignore[union-attr]
    bench.crawl()
    assert bench.bytes_read() == 0


def test_what_has_not_changed_is_not_read_again(bench: Bench) -> None:
    put_adapter(bench.pool / "a", 1)
    put_adapter(bench.pool / "b", 1)
    put_adapter(bench.pool / "c", 2, rank=3)
    first = bench.crawl(max_rank=2)
    assert bench.bytes_read() > 0
    assert bench.crawl(max_rank=2) == first
    assert bench.bytes_read() == 0


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    "change",
    [
        lambda bench, kept: touch(bench.pool / "a" / "adapter_model.safetensors"),
        lambda bench, kept: touch(bench.pool / "a" / "adapter_config.json"),
        lambda bench, kept: (bench.pool / "a" / "README.md").write_text("new"),
        lambda bench, kept: shutil.rmtree(kept),
        lambda bench, kept: (kept / "adapter_model.safetensors").write_bytes(b"short"),
    ],
)
def test_what_has_changed_is_read_again(
    bench: Bench, change: Callable[[Bench, Path], object]
) -> None:
    put_adapter(bench.pool / "a")
    kept = Path(bench.crawl()["a"].path or "")
    change(bench, kept)
    assert bench.verdicts() == {"a": "accepted"}
    assert bench.bytes_read() > 0
    assert weights_sha256(kept) == kept.name


def test_other_rules_look_again(bench: Bench) -> None:
    put_adapter(bench.pool / "a", rank=3)
    assert bench.verdicts(max_rank=2) == {"a": "rank_too_large"}
    assert bench.verdicts() == {"a": "accepted"}
    assert bench.verdicts(max_bytes=10) == {"a": "too_large"}
    assert bench.verdicts(licenses=frozenset({"mit"})) == {"a": "license_refused"}
    assert bench.verdicts(base_model="org/other") == {"a": "wrong_base"}
    assert bench.recorded() == {"a": "wrong_base"}


def test_a_changed_alpha_changes_what_is_kept(bench: Bench) -> None:
    put_adapter(bench.pool / "a")
    before = bench.crawl()["a"]
    put_adapter(bench.pool / "a", lora_alpha=8)
    after = bench.crawl()["a"]
    assert before.sha256 == after.sha256
    assert after.norm == pytest.approx(2 * (before.norm or 0.0))
    assert read_config(Path(after.path or ""))["lora_alpha"] == 8
    assert list(bench.settings.adapters_folder.iterdir()) == [Path(after.path or "")]


def test_of_several_folders_of_the_same_weights_the_one_that_nobody_names_goes(
    bench: Bench,
) -> None:
    put_adapter(bench.pool / "a", 1)
    before = bench.crawl()["a"]
    other = replace(bench.request, base_model="org/other", also_bases=frozenset({"org/base"}))
    list(crawl(other, bench.settings, SHAPES))
    put_adapter(bench.pool / "a", 1, lora_alpha=8)
    after = bench.crawl()["a"]
    assert after.path != before.path
    assert not Path(before.path or "").exists()
    with Catalog(bench.settings.catalog_file) as catalog:
        folders = {str(row.path) for row in catalog.kept()}
    assert {str(path) for path in bench.settings.adapters_folder.iterdir()} == folders
    assert len(folders) == 2


def test_a_duplicate_is_looked_at_again_when_the_first_is_forgotten(bench: Bench) -> None:
    put_adapter(bench.pool / "b")
    bench.crawl()
    put_adapter(bench.pool / "c")
    assert bench.verdicts() == {"b": "accepted", "c": "duplicate"}
    shutil.rmtree(bench.pool / "b")
    with Catalog(bench.settings.catalog_file) as catalog:
        catalog.forget("b")
    assert bench.verdicts() == {"c": "accepted"}


def test_a_pool_that_moved_is_no_pool_of_duplicates(bench: Bench) -> None:
    put_adapter(bench.pool / "a")
    bench.crawl()
    bench.pool.rename(bench.pool.with_name("moved"))
    moved = bench.pool.with_name("moved")
    assert bench.verdicts(folder=moved) == {"a": "accepted"}
    assert bench.recorded() == {"a": "accepted"}


def test_a_dry_run_writes_nothing(bench: Bench) -> None:
    put_adapter(bench.pool / "a", 1)
    put_adapter(bench.pool / "b", 1)
    documents = bench.crawl(dry_run=True)
    assert {name: one.reason or one.status for name, one in documents.items()} == {
        "a": "accepted",
        "b": "duplicate",
    }
    assert documents["a"].path is None
    assert documents["a"].norm is not None
    assert not bench.settings.home.exists()


def test_a_limit_counts_adapters_looked_at(bench: Bench) -> None:
    for number, name in enumerate("cab"):
        put_adapter(bench.pool / name, number)
    assert list(bench.crawl(limit=2)) == ["a", "b"]


def test_a_crawl_over_the_home_leaves_the_cache_out(bench: Bench, tmp_path: Path) -> None:
    put_adapter(bench.pool / "a")
    bench.crawl()
    assert list(bench.crawl(folder=tmp_path)) == ["pool/a"]


def test_one_adapter_that_cannot_be_kept_does_not_stop_the_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_adapter(bench.pool / "a", 1)
    put_adapter(bench.pool / "b", 2)
    stream = crawl(bench.request, bench.settings, SHAPES)
    monkeypatch.setattr(
        "recycle_cli.store.evidence.weights_sha256",
        lambda folder: "0" * 64 if folder.name == "a" else weights_sha256(folder),
    )
    first, second, _ = stream
    assert isinstance(first, AdapterDocument)
    assert isinstance(second, AdapterDocument)
    assert (first.status, first.reason, first.path) == ("failed", "unreadable", None)
    assert "changed while" in (first.detail or "")
    assert second.status == "accepted"


def test_a_cache_that_cannot_be_written_stops_the_crawl(bench: Bench) -> None:
    put_adapter(bench.pool / "a")
    bench.settings.home.mkdir()
    bench.settings.adapters_folder.write_text("in the way")
    with pytest.raises(RecycleError, match="cannot be copied"):
        bench.crawl()


def test_folders_that_cannot_be_crawled(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        crawl(bench.request, bench.settings, SHAPES)
    bench.pool.mkdir()
    with pytest.raises(InputError, match="holds no adapter"):
        crawl(bench.request, bench.settings, SHAPES)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        crawl(replace(bench.request, folder=tmp_path / "file"), bench.settings, SHAPES)
    assert not bench.settings.home.exists()


def test_importing_the_workflows_loads_no_torch() -> None:
    code = (
        "import sys, recycle_cli.workflows.crawl, recycle_cli.workflows.index;"
        "sys.exit(bool({'torch', 'safetensors', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_crawl_for_another_base_leaves_the_first_ones_pool_alone(bench: Bench) -> None:
    put_adapter(bench.pool / "one", seed=1)
    put_adapter(bench.pool / "other", seed=2, base_model_name_or_path="org/other")
    for _ in range(2):
        assert bench.verdicts() == {"one": "accepted", "other": "wrong_base"}
        assert bench.verdicts(base_model="org/other") == {"one": "wrong_base", "other": "accepted"}
    with Catalog(bench.settings.catalog_file) as catalog:
        pools = {
            name: [row.id for row in catalog.query(AdapterQuery(base_model=name))]
            for name in ("org/base", "org/other")
        }
    assert pools == {"org/base": ["one"], "org/other": ["other"]}


def test_of_checkpoints_the_latest_is_taken(bench: Bench) -> None:
    for step in (5, 50):
        put_adapter(bench.pool / f"run/checkpoint-{step}", step)
    *documents, _ = crawl(bench.request, bench.settings, SHAPES)
    found = [(d.id, d.revision, d.reason or d.status) for d in documents]  # type: ignore[union-attr]
    assert sorted(found) == [
        ("run", "checkpoint-5", "superseded"),
        ("run", "checkpoint-50", "accepted"),
    ]
    put_adapter(bench.pool / "run", 99)
    *documents, _ = crawl(bench.request, bench.settings, SHAPES)
    now = {d.revision: d.reason or d.status for d in documents}  # type: ignore[union-attr]
    assert now == {None: "accepted", "checkpoint-5": "superseded", "checkpoint-50": "superseded"}
