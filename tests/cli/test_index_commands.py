"""The subcommands of `recycle index`, with the real command."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.command import Recycle, assert_refused

WEIGHTS = "adapter_model.safetensors"


def test_a_search(crawled: Recycle) -> None:
    found = crawled("index", "list", "--search", "plain", "--json").documents
    assert [row["id"] for row in found] == ["lab/plain"]
    for odd in ('"', "AND (", "*", "id:plain NOT"):
        assert crawled("index", "list", "--search", odd, "--json").documents == []
    words = ("index", "list", "--source", "folder", "--author", "nobody", "--json")
    assert crawled(*words).stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "--sort", "relevance"), ("relevance", "--search")),
        (("list", "--source", "disk"), ("'disk'", "hub, folder")),
        (("forget", "lab/plain", "nobody"), ("no adapter 'nobody'",)),
    ],
)
def test_what_cannot_be_asked(crawled: Recycle, words: tuple[str, ...], said: tuple[str]) -> None:
    assert_refused(crawled("index", *words, succeeds=False), 2, *said)


def test_show_tells_people_all(crawled: Recycle) -> None:
    shown = crawled("index", "show", "lab/rslora").stdout
    for text in ("lab/rslora", "accepted", "8 modules", "q_proj"):
        assert text in shown
    refused = crawled("index", "show", "lab/dora").stdout
    assert "DoRA rescales" in refused


def test_a_card_cannot_drive_the_terminal(recycle: Recycle, pool: Path, pico_folder: Path) -> None:
    shutil.copytree(pool / "lab/plain", "wild/one")
    Path("wild/one/README.md").write_text("---\nlicense: mit\n---\nred \x1b[31m alert\nfine\n")
    recycle("crawl", "wild", "--base-model", pico_folder)
    shown = recycle("index", "show", "one").stdout
    assert "alert" in shown
    assert "\x1b" not in shown
    assert "\x1b[31m" in recycle("index", "show", "one", "--json").document["card"]


def test_stats_tell_the_funnel(crawled: Recycle) -> None:
    document = crawled("index", "stats", "--json").document
    assert document["found"] == 5
    assert document["funnel"] == [{"reason": "dora", "adapters": 1, "left": 4}]
    assert sum(document["alpha_over_rank"].values()) == 4
    told = crawled("index", "stats").stdout
    for text in ("found", "dora", "alpha / rank", "licences"):
        assert text in told


def test_damage_ends_with_3_and_is_repaired(crawled: Recycle) -> None:
    assert crawled("index", "verify").exit_code == 0
    folder = Path(crawled("index", "show", "lab/plain", "--json").document["path"])
    (folder / WEIGHTS).write_bytes(b"short")
    damaged = crawled("index", "verify", "--json", succeeds=False)
    assert damaged.exit_code == 3
    assert damaged.document["whole"] is False
    assert [one["id"] for one in damaged.document["damaged"]] == ["lab/plain"]
    assert damaged.stderr.splitlines()[-2].startswith("error: adapter 'lab/plain' of 4")
    told = crawled("index", "verify", succeeds=False)
    assert (told.exit_code, "lab/plain" in told.stdout) == (3, True)
    mended = crawled("index", "verify", "--repair", "--json")
    assert mended.document["whole"] is True
    assert [one["repaired"] for one in mended.document["damaged"]] == [True]
    assert crawled("index", "verify", "--json").document["damaged"] == []


def test_forgetting(crawled: Recycle) -> None:
    folder = Path(crawled("index", "show", "lab/plain", "--json").document["path"])
    would = crawled("index", "forget", "lab/plain", "--dry-run", "--json").document
    assert folder.is_dir()
    did = crawled("index", "forget", "lab/plain", "--json").document
    assert did == {**would, "dry_run": False}
    assert did["bytes"] > 0
    assert not folder.exists()
    assert_refused(crawled("index", "show", "lab/plain", succeeds=False), 2, "no adapter")
    assert "rows forgotten: 2" in crawled("index", "forget", "shop/mlp", "lab/dora").stdout
    assert crawled("index", "stats", "--json").document["found"] == 2


def test_duplicates(recycle: Recycle, pool: Path, pico_folder: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(pool / "lab/plain", Path("wild", name))
    recycle("crawl", "wild", "--base-model", pico_folder)
    (group,) = recycle("index", "duplicates", "--json").documents
    assert group["schema"] == "recycle.duplicates/1"
    assert (group["relation"], [one["id"] for one in group["adapters"]]) == (
        "identical",
        ["one", "two"],
    )
    assert "the same weights file" in recycle("index", "duplicates").stdout
    refused = recycle("index", "duplicates", "--threshold", "2", succeeds=False)
    assert refused.exit_code == 2


def test_an_index_of_the_first_version_is_brought_up_to_date(crawled: Recycle) -> None:
    """All that the first version did not have is computed from the cache."""
    before = crawled("index", "list", "--json").documents
    with closing(sqlite3.connect("home/catalog.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM details")
        connection.execute("INSERT INTO texts (texts) VALUES ('rebuild')")
        connection.commit()
    assert crawled("index", "duplicates").stderr.startswith("4 adapters have no fingerprint")
    assert crawled("index", "--json").document["updated"] == 4
    assert crawled("index", "list", "--json").documents == before
    assert crawled("index", "duplicates").stderr == ""


def test_documents_of_an_index_flow_on(crawled: Recycle, pico_folder: Path) -> None:
    shown = crawled("index", "show", "lab/plain", "--json").stdout
    merged = crawled(
        "merge", "-", "--base-model", pico_folder, "--out", "out", "--json", stdin=shown
    )
    assert json.loads(merged.stdout)["adapters"][0]["id"] == "lab/plain"
