import math
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_pool import crawl_pool, put_adapter

from recycle_cli.errors import InputError
from recycle_cli.records import AdapterDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.vetting import CHECKS
from recycle_cli.workflows.adapters import resolve_names
from recycle_cli.workflows.index import list_adapters, pool_statistics, show_adapter, update_index

CARD = "---\nlicense: mit\n---\n# Haiku\nIt writes haiku about rain.\n"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        put_adapter(tmp_path / "pool" / name, number, CARD if name == "b" else "")
    return tmp_path / "pool"


@pytest.fixture
def settings(tmp_path: Path, pool: Path) -> Settings:
    settings = Settings(tmp_path / "home")
    crawl_pool(settings, pool)
    return settings


def test_an_index_that_is_up_to_date_stays_as_it_is(settings: Settings) -> None:
    before = list_adapters(AdapterQuery(), settings)
    document = update_index(settings)
    assert (document.adapters, document.updated, document.missing) == (3, 0, [])
    assert list_adapters(AdapterQuery(), settings) == before


def test_empty_columns_are_computed_to_what_the_crawl_computes(settings: Settings) -> None:
    before = list_adapters(AdapterQuery(), settings)
    with Catalog(settings.catalog_file) as catalog:
        details = [catalog.details_of(document) for document in before]
        catalog.record(before[0].model_copy(update={"norm": None}))
        catalog.record(before[1].model_copy(update={"fingerprint": None}))
    with closing(sqlite3.connect(settings.catalog_file)) as connection:
        connection.execute(
            "UPDATE details SET modules = NULL, ranks = NULL, norms = NULL, projections = NULL"
            " WHERE adapter = (SELECT key FROM adapters WHERE id = 'c')"
        )
        connection.commit()
    assert update_index(settings).updated == 3
    assert list_adapters(AdapterQuery(), settings) == before
    with Catalog(settings.catalog_file) as catalog:
        assert [catalog.details_of(document) for document in before] == details


def test_the_details_of_an_older_index_are_read_from_the_cache(settings: Settings) -> None:
    with Catalog(settings.catalog_file) as catalog:
        before = [catalog.details_of(row) for row in catalog.query(AdapterQuery())]
        for row in catalog.query(AdapterQuery()):
            catalog.forget(row.id)
            catalog.record(row)  # as the migration leaves it, without details
    assert list_adapters(AdapterQuery(search="rain haiku"), settings) == []
    assert update_index(settings).updated == 3
    assert [row.id for row in list_adapters(AdapterQuery(search="rain haiku"), settings)] == ["b"]
    with Catalog(settings.catalog_file) as catalog:
        assert [catalog.details_of(row) for row in catalog.query(AdapterQuery())] == before


def test_a_folder_that_has_gone_is_missing_until_it_is_crawled_again(
    settings: Settings, pool: Path
) -> None:
    shutil.rmtree(show_adapter("b", settings).path or "")
    for updated in (1, 0):
        document = update_index(settings)
        assert (document.adapters, document.updated, document.missing) == (2, updated, ["b"])
    gone = show_adapter("b", settings)
    assert (gone.status, gone.reason, gone.path) == ("failed", "missing", None)
    crawl_pool(settings, pool)
    assert show_adapter("b", settings).status == "accepted"
    assert update_index(settings).missing == []


def test_a_folder_that_cannot_be_read_is_damaged(settings: Settings) -> None:
    document = show_adapter("c", settings)
    with Catalog(settings.catalog_file) as catalog:
        catalog.record(catalog.get("c").model_copy(update={"norm": None}))
    (Path(document.path or "") / "adapter_model.safetensors").write_bytes(b"short")
    update = update_index(settings)
    assert (update.adapters, update.updated, update.missing) == (2, 1, [])
    assert show_adapter("c", settings).reason == "damaged"


def test_questions(settings: Settings) -> None:
    (loudest,) = list_adapters(AdapterQuery(sort="-norm", limit=1), settings)
    assert loudest.norm == max(row.norm or 0.0 for row in list_adapters(AdapterQuery(), settings))
    assert [row.id for row in list_adapters(AdapterQuery(search="pool/b"), settings)] == ["b"]
    assert pool_statistics(settings).adapters == 3
    assert pool_statistics(settings, "org/other").adapters == 0
    with pytest.raises(InputError, match="no adapter 'd'"):
        show_adapter("d", settings)


def test_all_that_is_known_is_shown(settings: Settings, pool: Path) -> None:
    shown = show_adapter("b", settings)
    tensors = load_file(pool / "b" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.q_proj.lora_{x}.weight"].double() for x in "AB")
    norm = float(torch.linalg.norm(4 / 2 * b @ a))
    assert shown.card == CARD
    assert list(shown.modules) == ["q_proj"]
    assert shown.modules["q_proj"].rank == 2
    assert shown.modules["q_proj"].norm == pytest.approx(norm, rel=1e-6)
    assert shown.norm == pytest.approx(math.hypot(norm), rel=1e-6)
    assert shown.others == []
    assert shown.to_line().startswith('{"schema": "recycle.adapter/1", "id": "b"')


def test_an_adapter_of_two_base_models_shows_both(settings: Settings, pool: Path) -> None:
    put_adapter(pool / "d", 9, base_model_name_or_path="org/other")
    crawl_pool(settings, pool, ("org/base", "org/other"))
    shown = show_adapter("d", settings)
    assert (shown.status, shown.pool) == ("accepted", "org/other")
    (other,) = shown.others
    assert (other.pool, other.status, other.reason) == ("org/base", "rejected", "wrong_base")
    assert pool_statistics(settings, "org/base").found == 4
    assert pool_statistics(settings, "org/base").adapters == 3
    assert pool_statistics(settings, "org/other").adapters == 1


def test_the_funnel_goes_by_the_order_of_the_checks(settings: Settings, pool: Path) -> None:
    put_adapter(pool / "z", 0)
    put_adapter(pool / "y", 8, r=3)
    put_adapter(pool / "x", 7, use_dora=True)
    put_adapter(pool / "w", 6, base_model_name_or_path="org/other")
    crawl_pool(settings, pool)
    stats = pool_statistics(settings)
    codes = [code for check in CHECKS for code in check.codes]
    reasons = [step.reason for step in stats.funnel]
    assert set(reasons) == {"dora", "wrong_base", "rank_mismatch", "duplicate"}
    assert reasons == sorted(reasons, key=codes.index)
    assert [step.left for step in stats.funnel] == [6, 5, 4, 3]
    assert (stats.found, stats.adapters) == (7, 3)


def test_a_superseded_revision_is_usable_by_name(settings: Settings) -> None:
    with Catalog(settings.catalog_file) as catalog:
        one, two = (catalog.get(name) for name in "ab")
        for name, document in (("r1", one), ("r2", two)):
            facts = {"id": "o/x", "source": "hub", "origin": "o/x", "revision": name}
            catalog.record(document.model_copy(update=facts))
    assert [row.id for row in list_adapters(AdapterQuery(), settings)] == ["a", "b", "c", "o/x"]
    (old,) = resolve_names(["o/x@r1"], settings)
    assert (old.ref.revision, old.ref.sha256, old.ref.path) == ("r1", one.sha256, one.path)
    (new,) = resolve_names(["o/x"], settings)
    assert new.ref.sha256 == two.sha256
    assert list(new.load("org/base")) == ["q_proj"]
    with Catalog(settings.catalog_file) as catalog:
        catalog.record(one.model_copy(update={"status": "rejected", "reason": "dora"}))
    with pytest.raises(InputError, match="rejected: dora"):
        resolve_names(["a"], settings)


def test_asking_makes_no_index(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "nothing")
    assert list_adapters(AdapterQuery(), settings) == []
    assert pool_statistics(settings).found == 0
    assert update_index(settings).adapters == 0
    with pytest.raises(InputError, match="no adapter 'a'"):
        show_adapter("a", settings)
    assert not settings.home.exists()


FIGURES = """
import sys
from pathlib import Path
from recycle_cli.settings import Settings
from recycle_cli.workflows.index import pool_statistics
document = pool_statistics(Settings(Path(sys.argv[1])))
print([step.reason for step in document.funnel], "torch" in sys.modules)
"""


def test_the_figures_load_no_torch(tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        for number, reason in enumerate(("norm_out_of_range", "dora", "gated")):
            document = AdapterDocument(
                id=reason, source="hub", origin=reason, status="rejected", reason=reason
            )
            catalog.record(document, str(number))
    words = [sys.executable, "-c", FIGURES, str(tmp_path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['gated', 'dora', 'norm_out_of_range'] False"
