import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recycle_cli.errors import InputError
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.workflows.crawl import CrawlRequest, crawl_folder
from recycle_cli.workflows.index import list_adapters, pool_statistics, show_adapter, update_index

SHAPES = {"q_proj": (6, 6)}


def put_adapter(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "base_model.model.q_proj.lora_A.weight": torch.randn(2, 6, generator=generator),
        "base_model.model.q_proj.lora_B.weight": torch.randn(6, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def crawl(settings: Settings, pool: Path) -> None:
    list(crawl_folder(CrawlRequest(pool, "org/base"), settings, SHAPES))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        put_adapter(tmp_path / "pool" / name, number)
    return tmp_path / "pool"


@pytest.fixture
def settings(tmp_path: Path, pool: Path) -> Settings:
    settings = Settings(tmp_path / "home")
    crawl(settings, pool)
    return settings


def test_an_index_that_is_up_to_date_stays_as_it_is(settings: Settings) -> None:
    before = list_adapters(AdapterQuery(), settings)
    document = update_index(settings)
    assert (document.adapters, document.updated, document.missing) == (3, 0, [])
    assert list_adapters(AdapterQuery(), settings) == before


def test_empty_columns_are_computed_to_what_the_crawl_computes(settings: Settings) -> None:
    before = list_adapters(AdapterQuery(), settings)
    with Catalog(settings.catalog_file) as catalog:
        catalog.record(before[0].model_copy(update={"norm": None}))
        catalog.record(before[1].model_copy(update={"fingerprint": None}))
    assert update_index(settings).updated == 2
    assert list_adapters(AdapterQuery(), settings) == before


def test_a_folder_that_has_gone_is_missing_until_it_is_crawled_again(
    settings: Settings, pool: Path
) -> None:
    shutil.rmtree(show_adapter("b", settings).path or "")
    for updated in (1, 0):
        document = update_index(settings)
        assert (document.adapters, document.updated, document.missing) == (2, updated, ["b"])
    gone = show_adapter("b", settings)
    assert (gone.status, gone.reason, gone.path) == ("failed", "missing", None)
    crawl(settings, pool)
    assert show_adapter("b", settings).status == "accepted"
    assert update_index(settings).missing == []


def test_a_folder_that_cannot_be_read_is_damaged(settings: Settings) -> None:
    document = show_adapter("c", settings)
    with Catalog(settings.catalog_file) as catalog:
        catalog.record(document.model_copy(update={"norm": None}))
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
