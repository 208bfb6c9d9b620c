import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.index import check_texts

from recycle_cli.errors import RecycleError
from recycle_cli.store import migrations
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.migrations import MIGRATIONS, Migration, migrate

FIRST = """
CREATE TABLE migrations (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL);
INSERT INTO migrations VALUES ('0001_adapters', '2025-01-01T00:00:00+00:00');
CREATE TABLE adapters (
    source TEXT NOT NULL,
    origin TEXT NOT NULL,
    id TEXT NOT NULL,
    revision TEXT,
    sha256 TEXT,
    path TEXT,
    status TEXT NOT NULL CHECK (status IN ('accepted', 'rejected', 'failed')),
    reason TEXT,
    detail TEXT,
    base_model TEXT,
    rank_min INTEGER,
    rank_max INTEGER,
    alpha REAL,
    use_rslora INTEGER,
    target_modules TEXT NOT NULL,
    license TEXT,
    size_bytes INTEGER,
    norm REAL,
    fingerprint TEXT,
    downloads INTEGER,
    stamp TEXT,
    PRIMARY KEY (source, origin)
) STRICT;
CREATE INDEX adapters_by_id ON adapters (id);
CREATE INDEX adapters_by_sha256 ON adapters (sha256);
"""
"""The index as the first version made it."""


def old_row(name: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "source": "folder",
        "origin": f"/pool/{name}",
        "id": name,
        "status": "accepted",
        "sha256": "a" * 64,
        "path": "/cache/" + "a" * 64,
        "base_model": "Org/Base",
        "rank_min": 4,
        "rank_max": 8,
        "alpha": 16.0,
        "use_rslora": 1,
        "target_modules": '["q_proj"]',
        "license": "mit",
        "size_bytes": 10,
        "norm": 2.0,
        "fingerprint": "f" * 16,
        "downloads": 3,
        "stamp": f"stamp of {name}",
    }
    return plain | changes


OLD_ROWS = [
    old_row("good", revision="abc"),
    old_row("dora", status="rejected", reason="dora", detail="it uses DoRA", path=None),
    old_row("wrong", status="rejected", reason="wrong_base", base_model="org/other", path=None),
    old_row("nameless", status="rejected", reason="bad_config", base_model=None, sha256=None),
]


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    file = tmp_path / "catalog.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(FIRST)
        for row in OLD_ROWS:
            marks = ", ".join(f":{name}" for name in row)
            connection.execute(f"INSERT INTO adapters ({', '.join(row)}) VALUES ({marks})", row)
        connection.commit()
    return file


def test_the_first_index_keeps_its_pool(old_file: Path) -> None:
    for _ in range(2):
        with Catalog(old_file) as catalog:
            rows = {row.id: row for row in catalog.query(AdapterQuery(status=None))}
    assert {name: row.pool for name, row in rows.items()} == {
        "good": "Org/Base",
        "dora": "Org/Base",
        "wrong": None,
        "nameless": None,
    }
    for old in OLD_ROWS:
        new = rows[old["id"]].model_dump()
        assert new["rank"] == {"min": 4, "max": 8}
        assert new["target_modules"] == ["q_proj"]
        assert new["use_rslora"] is True
        assert new["tags"] == []
        kept = set(old) & set(new) - {"target_modules", "use_rslora"}
        assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    check_texts(old_file)


def test_what_was_vetted_before_is_not_vetted_again(old_file: Path) -> None:
    with Catalog(old_file) as catalog:
        held = catalog.unchanged("folder", "/pool/good", "stamp of good", pool="org/base")
        assert held is not None
        assert held.revision == "abc"
        assert catalog.get("good@abc").id == "good"
        assert [row.id for row in catalog.query(AdapterQuery(base_model="org/BASE"))] == ["good"]
        assert [row.id for row in catalog.query(AdapterQuery(search="dora", status=None))] == [
            "dora"
        ]
        assert [row.id for row in catalog.lacking_derived()] == ["good"]


def test_a_newer_index_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "catalog.sqlite"
    Catalog(file).close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO migrations VALUES ('9999_future', '')")
        connection.commit()
    with pytest.raises(RecycleError, match="9999_future"):
        Catalog(file)


@pytest.mark.parametrize("broken", range(1, len(MIGRATIONS)))
def test_a_migration_that_fails_half_way_can_be_done_again(
    old_file: Path, broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last statement fails; what came before it is undone."""
    name, statements = MIGRATIONS[broken]
    with monkeypatch.context() as patch:
        damaged = Migration(name, (*statements[:-1], "SELECT no_such_function()"))
        patch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS[:broken], damaged))
        with pytest.raises(RecycleError, match="no_such_function"):
            Catalog(old_file)
    with Catalog(old_file) as catalog:
        assert len(catalog.query(AdapterQuery(status=None))) == len(OLD_ROWS)
    check_texts(old_file)


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
