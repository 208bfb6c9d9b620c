import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import AdapterDocument, RankRange
from recycle_cli.store import migrations
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.migrations import Migration, migrate


def adapter(name: str, digit: str = "a", **changes: Any) -> AdapterDocument:
    fields: dict[str, Any] = {
        "id": name,
        "source": "folder",
        "origin": f"/pool/{name}",
        "sha256": digit * 64,
        "path": f"/cache/{digit * 64}",
        "status": "accepted",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "rank": RankRange(min=4, max=8),
        "alpha": 16.0,
        "use_rslora": True,
        "target_modules": ["k_proj", "q_proj"],
        "license": "MIT",
        "size_bytes": 100,
        "norm": 2.0,
        "fingerprint": "f" * 16,
        "downloads": None,
    }
    return AdapterDocument(**fields | changes)


def rejected(name: str, reason: str = "dora", **changes: Any) -> AdapterDocument:
    empty = {"sha256": None, "path": None, "rank": None, "norm": None, "fingerprint": None}
    return adapter(name, **{**empty, "status": "rejected", "reason": reason, **changes})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "home" / "catalog.sqlite") as opened:
        yield opened


def ids(catalog: Catalog, **query: Any) -> list[str]:
    return [document.id for document in catalog.query(AdapterQuery(**query))]


def test_what_is_recorded_is_read_back(catalog: Catalog, tmp_path: Path) -> None:
    documents = [adapter("a", revision="r1", downloads=3), rejected("b", detail="because")]
    for document in documents:
        catalog.record(document)
    with Catalog(tmp_path / "home" / "catalog.sqlite") as again:
        assert again.query(AdapterQuery(status=None)) == documents


def test_the_same_place_seen_again_replaces_its_row(catalog: Catalog) -> None:
    catalog.record(rejected("a"))
    catalog.record(adapter("renamed", origin="/pool/a"))
    assert ids(catalog, status=None) == ["renamed"]


def test_an_adapter_that_moved_has_one_row(catalog: Catalog) -> None:
    catalog.record(adapter("a"))
    catalog.record(adapter("a", origin="/elsewhere/a"))
    catalog.record(adapter("a", "b", origin="/third/a"))
    origins = [document.origin for document in catalog.query(AdapterQuery())]
    assert origins == ["/elsewhere/a", "/third/a"]


def test_an_unchanged_adapter_is_known_by_its_stamp(catalog: Catalog) -> None:
    catalog.record(adapter("a"), stamp="one")
    assert catalog.unchanged("folder", "/pool/a", "one") == adapter("a")
    assert catalog.unchanged("folder", "/pool/a", "two") is None
    assert catalog.unchanged("hub", "/pool/a", "one") is None


def test_names(catalog: Catalog) -> None:
    catalog.record(adapter("org/one", "a", revision="abc"))
    catalog.record(adapter("org/two", "b"))
    for name in (
        "org/one",
        "org/one@abc",
        "/pool/org/one",
        "/cache/" + "a" * 64,
        "sha256:" + "a" * 8,
        "sha256:" + "A" * 64,
        "a" * 9,
    ):
        assert catalog.get(name).id == "org/one"
    for name in ("org/one@zzz", "a" * 7, "sha256:" + "c" * 8, "/pool/org"):
        assert catalog.find(name) is None


def test_a_relative_path_is_a_name(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.record(adapter("x", origin=str(tmp_path / "pool" / "x")))
    monkeypatch.chdir(tmp_path)
    assert catalog.get("./pool/x").id == "x"
    assert catalog.get("pool/../pool/x").id == "x"


def test_unknown_names_come_with_the_nearest(catalog: Catalog) -> None:
    catalog.record(adapter("mira/sst2-smol"))
    with pytest.raises(InputError, match="'mira/sst-smol'") as caught:
        catalog.get("mira/sst-smol")
    assert "did you mean mira/sst2-smol?" in caught.value.hint
    with pytest.raises(InputError) as caught:
        catalog.get("zzz")
    assert "1 adapters" in caught.value.hint


@pytest.mark.parametrize("name", ["sha256:abc", "sha256:nothexdigits", "sha256:aaaaaaa*"])
def test_bad_digests(catalog: Catalog, name: str) -> None:
    with pytest.raises(InputError, match="no sha256"):
        catalog.get(name)


def test_an_ambiguous_name_lists_its_candidates(catalog: Catalog) -> None:
    catalog.record(adapter("same", sha256="ab" * 32, origin="/one/same"))
    catalog.record(adapter("same", sha256="ab" * 31 + "cd", origin="/two/same"))
    for name in ("same", "sha256:abababab"):
        with pytest.raises(InputError, match="fits 2 adapters") as caught:
            catalog.get(name)
        assert "/one/same" in caught.value.hint
        assert "/two/same" in caught.value.hint
    assert catalog.get("sha256:" + "ab" * 32).origin == "/one/same"


def test_a_rejected_twin_does_not_compete(catalog: Catalog) -> None:
    catalog.record(rejected("copy", "duplicate", sha256="a" * 64))
    catalog.record(adapter("original"))
    assert catalog.get("sha256:" + "a" * 8).id == "original"
    assert catalog.get("copy").reason == "duplicate"


def test_holder(catalog: Catalog) -> None:
    catalog.record(adapter("one", "a"))
    catalog.record(rejected("two", sha256="b" * 64))
    assert catalog.holder_of("a" * 64, "other") == "one"
    assert catalog.holder_of("a" * 64, "one") is None
    assert catalog.holder_of("b" * 64, "other") is None


@pytest.fixture
def filled(catalog: Catalog) -> Catalog:
    catalog.record(adapter("a", "a", norm=3.0, license="mit"))
    catalog.record(adapter("b", "b", norm=None, rank=RankRange(min=2, max=2), license=None))
    catalog.record(adapter("c", "c", norm=1.0, target_modules=["down_proj"], base_model="org/x"))
    catalog.record(rejected("d", detail="it uses DoRA", license="other"))
    return catalog


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["a", "b", "c"]),
        ({"status": None}, ["a", "b", "c", "d"]),
        ({"status": "rejected"}, ["d"]),
        ({"base_model": "smollm2"}, ["a", "b"]),
        ({"base_model": "ORG/x/"}, ["c"]),
        ({"license": "Mit"}, ["a", "c"]),
        ({"min_rank": 3}, ["a", "c"]),
        ({"min_rank": 5}, []),
        ({"max_rank": 7}, ["b"]),
        ({"target_module": "q_proj"}, ["a", "b"]),
        ({"target_module": "proj"}, []),
        ({"search": "DORA", "status": None}, ["d"]),
        ({"search": "%"}, []),
        ({"search": "pool/a"}, ["a"]),
        ({"limit": 2}, ["a", "b"]),
        ({"limit": 0}, []),
        ({"sort": "norm"}, ["c", "a", "b"]),
        ({"sort": "-norm"}, ["a", "c", "b"]),
        ({"sort": "rank"}, ["b", "a", "c"]),
        ({"sort": "-id"}, ["c", "b", "a"]),
        ({"license": "'; DROP TABLE adapters; --"}, []),
    ],
)
def test_queries(filled: Catalog, query: dict[str, Any], expected: list[str]) -> None:
    assert ids(filled, **query) == expected


def test_an_unknown_sort_key_is_named(filled: Catalog) -> None:
    with pytest.raises(InputError, match="unknown sort key 'nrom'") as caught:
        filled.query(AdapterQuery(sort="-nrom"))
    assert "norm" in caught.value.hint


def test_statistics(filled: Catalog) -> None:
    stats = filled.statistics()
    assert stats.adapters == 3
    assert stats.counts == {"accepted": 3, "rejected": 1}
    assert stats.reasons == {"dora": 1}
    assert stats.ranks == {"8": 2, "2": 1}
    assert stats.licenses == {"mit": 1, "unknown": 1, "MIT": 1}
    assert stats.target_modules == {"k_proj": 2, "q_proj": 2, "down_proj": 1}
    assert stats.size_bytes == 300
    assert stats.norm == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert filled.statistics("org/x").base_models == {"org/x": 1}
    assert filled.statistics("org/none").norm is None


def test_changes_to_a_row(filled: Catalog) -> None:
    filled.set_derived(filled.get("b"), 7.0, "0" * 16)
    assert (filled.get("b").norm, filled.get("b").fingerprint) == (7.0, "0" * 16)
    filled.record(adapter("a", "a"), stamp="one")
    filled.set_failed(filled.get("a"), "missing", "gone")
    failed = filled.get("a")
    assert (failed.status, failed.reason, failed.path) == ("failed", "missing", None)
    assert filled.unchanged("folder", failed.origin, "one") is None
    assert filled.forget("c").id == "c"
    assert filled.find("c") is None


def test_an_index_in_memory_touches_no_disk(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with Catalog(None) as catalog:
        catalog.record(adapter("a"))
        assert ids(catalog) == ["a"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_index(tmp_path: Path) -> None:
    file = tmp_path / "catalog.sqlite"
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(RecycleError, match="cannot be used") as caught:
        Catalog(file)
    assert "crawling again" in caught.value.hint
    (tmp_path / "plain").write_text("")
    with pytest.raises(RecycleError, match="cannot be used"):
        Catalog(tmp_path / "plain" / "catalog.sqlite")


def test_a_newer_index_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "catalog.sqlite"
    Catalog(file).close()
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO migrations VALUES ('9999_future', '')")
    connection.close()
    with pytest.raises(RecycleError, match="9999_future"):
        Catalog(file)


def test_a_failed_migration_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Migration("0001_good", ("CREATE TABLE good (x)",))
    bad = Migration("0002_bad", ("CREATE TABLE half (x)", "CREATE TABLE good (x)"))
    monkeypatch.setattr(migrations, "MIGRATIONS", (good, bad))
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        migrate(connection)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "good" in tables
    assert "half" not in tables
    assert [row[0] for row in connection.execute("SELECT name FROM migrations")] == ["0001_good"]
    connection.close()


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "catalog.sqlite"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_write, args=(file, n, barrier)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0] * 4
    with Catalog(file) as catalog:
        assert len(ids(catalog)) == 40


def test_new_files_opened_by_several_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    openers = [context.Process(target=_open_many, args=(tmp_path, barrier)) for _ in range(6)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(30)
    assert [opener.exitcode for opener in openers] == [0] * 6


def _open_many(folder: Path, barrier: Any) -> None:
    for number in range(30):
        barrier.wait(20)
        Catalog(folder / f"{number}.sqlite").close()


def _write(file: Path, number: int, barrier: Any) -> None:
    barrier.wait(20)
    with Catalog(file) as catalog:
        for n in range(10):
            catalog.record(adapter(f"{number}/{n}", str(number)))
