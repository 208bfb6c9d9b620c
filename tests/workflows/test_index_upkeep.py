import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.index import check_texts
from support.small_pool import crawl_pool, put_adapter

from recycle_cli.errors import GateNotMet, InputError, RecycleError
from recycle_cli.settings import Settings
from recycle_cli.store.cache import damage
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.workflows.index import list_adapters, show_adapter, update_index
from recycle_cli.workflows.index_duplicates import find_duplicates
from recycle_cli.workflows.index_forget import forget_adapters
from recycle_cli.workflows.index_verify import check_whole, verify_index

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        put_adapter(tmp_path / "pool" / name, number)
    return tmp_path / "pool"


@pytest.fixture
def settings(tmp_path: Path, pool: Path) -> Settings:
    settings = Settings(tmp_path / "home", offline=True)
    crawl_pool(settings, pool)
    return settings


def kept(name: str, settings: Settings) -> Path:
    return Path(show_adapter(name, settings).path or "")


# --- verify ------------------------------------------------------------------------------------


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def lose_the_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def spoil_the_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def put_a_file_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGES = [
    flip_a_byte,
    cut_short,
    lose_the_configuration,
    spoil_the_configuration,
    remove,
    put_a_file_there,
]


def test_a_whole_cache(settings: Settings, pool: Path) -> None:
    before = list_adapters(AdapterQuery(status=None), settings)
    document = verify_index(settings)
    assert (document.adapters, document.damaged, document.whole) == (3, [], True)
    assert document.bytes == sum((pool / name / WEIGHTS).stat().st_size for name in "abc")
    check_whole(document)
    assert list_adapters(AdapterQuery(status=None), settings) == before


@pytest.mark.parametrize("damaging", DAMAGES)
def test_damage_is_found_and_mended(settings: Settings, damaging: Callable[[Path], None]) -> None:
    folder = kept("b", settings)
    damaging(folder)
    document = verify_index(settings)
    (found,) = document.damaged
    assert (found.id, found.sha256, found.repaired) == ("b", folder.name, False)
    assert found.problem == ("damaged" if folder.is_dir() else "missing")
    assert found.detail
    with pytest.raises(GateNotMet, match="'b' of 3 cannot be used") as caught:
        check_whole(document)
    assert "--repair" in caught.value.hint
    mended = verify_index(settings, repair=True)
    assert [one.repaired for one in mended.damaged] == [True]
    check_whole(mended)
    assert damage(folder) is None
    assert verify_index(settings).damaged == []
    assert list(settings.adapters_folder.glob(".unfinished-*")) == []


def test_what_cannot_be_fetched_again_stays_as_it_was(settings: Settings, pool: Path) -> None:
    lose_the_configuration(kept("a", settings))
    remove(kept("b", settings))
    flip_a_byte(kept("c", settings))
    shutil.rmtree(pool / "a")
    put_adapter(pool / "b", 77)
    document = verify_index(settings, repair=True)
    assert {one.id: one.repaired for one in document.damaged} == {
        "a": False,
        "b": False,
        "c": True,
    }
    assert all("not repaired: " in one.detail for one in document.damaged[:2])
    assert (kept("a", settings) / WEIGHTS).is_file()
    with pytest.raises(GateNotMet, match="'a' and 1 more of 3"):
        check_whole(document)


def test_superseded_revisions_are_verified_too(settings: Settings) -> None:
    with Catalog(settings.catalog_file) as catalog:
        for name, revision in (("a", "r1"), ("b", "r2")):
            facts = {"id": "o/x", "source": "hub", "origin": "o/x", "revision": revision}
            catalog.record(catalog.get(name).model_copy(update=facts))
        catalog.forget("a")
    with Catalog(settings.catalog_file) as catalog:
        remove(Path(catalog.get("o/x@r1").path or ""))
    (found,) = verify_index(settings).damaged
    assert (found.id, found.revision, found.problem) == ("o/x", "r1", "missing")
    (found,) = verify_index(settings, repair=True).damaged
    assert "no network" in found.detail


def test_an_empty_index_is_whole(tmp_path: Path) -> None:
    document = verify_index(Settings(tmp_path / "nothing"))
    assert (document.adapters, document.whole) == (0, True)
    assert not (tmp_path / "nothing").exists()


# --- forget ------------------------------------------------------------------------------------


def test_what_is_forgotten_leaves_the_disk_and_may_come_back(
    settings: Settings, pool: Path
) -> None:
    folder = kept("b", settings)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for dry_run in (True, False):
        document = forget_adapters(["b"], settings, dry_run)
        assert [one.id for one in document.adapters] == ["b"]
        assert (document.bytes, document.dry_run) == (size, dry_run)
        assert folder.exists() == dry_run
    assert [row.id for row in list_adapters(AdapterQuery(), settings)] == ["a", "c"]
    check_texts(settings.catalog_file)
    crawl_pool(settings, pool)
    assert [row.id for row in list_adapters(AdapterQuery(), settings)] == ["a", "b", "c"]
    assert folder.is_dir()


def test_a_folder_that_another_row_needs_stays(settings: Settings) -> None:
    folder = kept("a", settings)
    with Catalog(settings.catalog_file) as catalog:
        facts = {"id": "twin", "origin": "/elsewhere", "pool": "org/other"}
        catalog.record(catalog.get("a").model_copy(update=facts))
    document = forget_adapters(["a"], settings)
    assert document.bytes == 0
    assert folder.is_dir()
    assert forget_adapters(["twin"], settings).bytes > 0
    assert not folder.exists()


def test_two_rows_of_one_folder_free_it_once(settings: Settings) -> None:
    folder = kept("a", settings)
    with Catalog(settings.catalog_file) as catalog:
        catalog.record(catalog.get("a").model_copy(update={"pool": "org/other"}))
    sizes = [one.bytes for one in forget_adapters(["a"], settings, dry_run=True).adapters]
    assert sorted(size > 0 for size in sizes) == [False, True]
    assert len(forget_adapters(["a", "a"], settings).adapters) == 2
    assert not folder.exists()


def test_a_refused_twin_does_not_keep_a_folder(settings: Settings, pool: Path) -> None:
    put_adapter(pool / "twin", 0)
    crawl_pool(settings, pool)
    assert show_adapter("twin", settings).reason == "duplicate"
    folder = kept("a", settings)
    assert forget_adapters(["a"], settings).bytes > 0
    assert not folder.exists()
    shutil.rmtree(pool / "a")
    crawl_pool(settings, pool)
    assert show_adapter("twin", settings).status == "accepted"
    assert folder.is_dir()


def test_one_unknown_name_forgets_nothing(settings: Settings) -> None:
    with pytest.raises(InputError, match="no adapter 'nobody'"):
        forget_adapters(["a", "nobody"], settings)
    assert len(list_adapters(AdapterQuery(), settings)) == 3


def test_one_whose_folder_has_gone_is_forgotten(settings: Settings) -> None:
    shutil.rmtree(kept("a", settings))
    assert forget_adapters(["a"], settings).bytes == 0
    assert update_index(settings).adapters == 2
    shutil.rmtree(settings.adapters_folder)
    assert forget_adapters(["b", "c"], settings).bytes == 0
    assert list_adapters(AdapterQuery(status=None), settings) == []


def test_folders_that_cannot_be_removed_are_told(settings: Settings) -> None:
    settings.adapters_folder.chmod(0o500)
    try:
        if os.access(settings.adapters_folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(RecycleError, match="2 folders cannot be removed"):
            forget_adapters(["a", "b"], settings)
    finally:
        settings.adapters_folder.chmod(0o700)
    assert [row.id for row in list_adapters(AdapterQuery(), settings)] == ["c"]


# --- duplicates --------------------------------------------------------------------------------


def test_duplicates_of_every_kind(settings: Settings, pool: Path) -> None:
    put_adapter(pool / "same file", 0)
    put_adapter(pool / "same update", 0, metadata={"format": "pt", "saved": "again"})
    put_adapter(pool / "louder", 0, lora_alpha=8, metadata={"saved": "louder"})
    crawl_pool(settings, pool)
    found = find_duplicates(settings, 0.99)
    assert found.not_compared == 0
    groups = {group.relation: [one.id for one in group.adapters] for group in found.groups}
    assert groups == {
        "identical": ["a", "same file"],
        "same_update": ["a", "same update"],
        "near": ["a", "louder"],
    }
    assert {group.base_model for group in found.groups} == {"org/base"}
    statuses = [[one.status for one in group.adapters] for group in found.groups]
    assert statuses[0] == ["accepted", "rejected"]
    for group in found.groups:
        assert all(one.cosine == pytest.approx(1.0, abs=1e-5) for one in group.adapters)
    assert find_duplicates(settings, 0.99, "org/other").groups == []


def test_the_one_downloaded_most_leads(settings: Settings) -> None:
    with Catalog(settings.catalog_file) as catalog:
        one = catalog.get("a")
        details = catalog.details_of(one)
        for name, downloads, created in (("x", 5, "2025"), ("y", 9, "2025"), ("z", 9, "2024")):
            facts = {
                "id": name,
                "origin": f"/{name}",
                "downloads": downloads,
                "created_at": created,
                "sha256": name.encode().hex() * 32,
            }
            catalog.record(one.model_copy(update=facts), details=details)
    (group,) = find_duplicates(settings, 0.99).groups
    assert [one.id for one in group.adapters] == ["z", "y", "x", "a"]


def test_adapters_of_two_base_models_are_no_duplicates(settings: Settings, pool: Path) -> None:
    put_adapter(pool / "d", 0, base_model_name_or_path="org/other")
    crawl_pool(settings, pool, ("org/other",))
    assert len(list_adapters(AdapterQuery(), settings)) == 4
    assert find_duplicates(settings, 0.99).groups == []


def test_what_has_no_fingerprint_is_counted(settings: Settings, pool: Path) -> None:
    load = load_file(pool / "a" / WEIGHTS)
    save_file(load, pool / "b" / WEIGHTS, metadata={"saved": "again"})
    crawl_pool(settings, pool)
    with Catalog(settings.catalog_file) as catalog:
        row = catalog.get("b")
        catalog.forget("b")
        catalog.record(row)
    found = find_duplicates(settings, 0.99)
    assert (found.groups, found.not_compared) == ([], 1)
    update_index(settings)
    found = find_duplicates(settings, 0.99)
    assert ([group.relation for group in found.groups], found.not_compared) == (["same_update"], 0)
