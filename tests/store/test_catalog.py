import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.index import check_texts

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import AdapterDocument, RankRange
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.details import Details, ModuleFacts

MODULES = {
    "layers.0.q_proj": ModuleFacts(4, 1.5, [0.5] * 8),
    "layers.1.q_proj": ModuleFacts(8, 2.5, [-1.25] * 8),
}


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


def test_an_unchanged_adapter_is_known_by_its_revision_and_pool(catalog: Catalog) -> None:
    one = adapter("a", source="hub", origin="a", revision="r1", pool="org/Base")
    catalog.record(one, stamp="s")
    assert catalog.unchanged("hub", "a", "s") == one
    assert catalog.unchanged("hub", "a", "s", revision="r1", pool="ORG/base") == one
    assert catalog.unchanged("hub", "a", "s", revision="r2") is None
    assert catalog.unchanged("hub", "a", "s", pool="org/other") is None


def test_every_field_is_kept(catalog: Catalog) -> None:
    document = adapter(
        "org/one",
        source="hub",
        origin="org/one",
        revision="abc",
        pool="org/base",
        author="org",
        likes=3,
        downloads=7,
        created_at="2025-01-01T00:00:00+00:00",
        last_modified="2025-02-01T00:00:00+00:00",
        tags=["peft", "über", "base_model:org/base"],
        use_rslora=False,
        reason="r",
        detail="d",
    )
    assert None not in document.model_dump().values()
    catalog.record(document)
    (back,) = catalog.query(AdapterQuery())
    assert back == AdapterDocument.model_validate(document.model_dump())
    assert back.to_line() == document.to_line()


def test_a_base_model_has_a_row_of_its_own_whatever_its_name(catalog: Catalog) -> None:
    catalog.record(adapter("a", pool="org/One", base_model="org/One"))
    catalog.record(rejected("a", pool="org/two", base_model="org/One"))
    catalog.record(adapter("a", pool="ORG/one", base_model="unsloth/one"))
    assert [row.pool for row in catalog.query(AdapterQuery(status=None))] == ["ORG/one", "org/two"]
    for name, statuses in (("org/ONE", ["accepted"]), ("org/two", ["rejected"])):
        rows = catalog.query(AdapterQuery(base_model=name, status=None))
        assert [row.status for row in rows] == statuses
        found = catalog.at("folder", "/pool/a", pool=name)
        assert found is not None
        assert [found.status] == statuses
    assert catalog.at("folder", "/pool/a", pool="org/three") is None
    best = catalog.at("folder", "/pool/a")
    assert best is not None
    assert best.status == "accepted"
    assert catalog.holder_of("a" * 64, "b", pool="org/one") == "a"
    assert catalog.holder_of("a" * 64, "b", pool="org/two") is None


def test_a_row_of_an_unknown_pool_goes_when_the_pool_is_known(catalog: Catalog) -> None:
    catalog.record(rejected("a", base_model=None))
    catalog.record(rejected("b", base_model=None))
    catalog.record(adapter("a", pool="org/base"))
    rows = catalog.query(AdapterQuery(status=None))
    assert [(row.id, row.pool) for row in rows] == [("a", "org/base"), ("b", None)]


def revision(name: str, digit: str, **changes: Any) -> AdapterDocument:
    return adapter(
        "o/a", digit, **{"source": "hub", "origin": "o/a", "revision": name, "pool": "p", **changes}
    )


def test_a_revision_takes_the_place_of_the_accepted_one(catalog: Catalog) -> None:
    catalog.record(revision("r1", "a"), stamp="s")
    catalog.record(revision("r1", "a", pool="q"))
    catalog.record(revision("r2", "b"), stamp="s")
    old = catalog.get("o/a@r1")
    assert (old.pool, old.status) == ("q", "accepted")
    (old,) = [row for row in catalog.query(AdapterQuery(status="rejected")) if row.pool == "p"]
    assert (old.reason, old.detail) == ("superseded", "revision r2 took its place")
    assert (old.sha256, old.path) == ("a" * 64, "/cache/" + "a" * 64)
    assert catalog.unchanged("hub", "o/a", "s", revision="r1", pool="p") is None
    assert catalog.unchanged("hub", "o/a", "s", revision="r2", pool="p") is not None
    # Asked for again, the older one comes back.
    catalog.record(revision("r1", "a"))
    assert catalog.get("o/a@r2").reason == "superseded"


def test_of_several_revisions_a_name_means_the_accepted_one_or_the_latest(catalog: Catalog) -> None:
    catalog.record(revision("r1", "a", status="rejected", reason="norm_out_of_range", path=None))
    catalog.record(revision("r2", "b"))
    catalog.record(
        revision("r3", "c", status="failed", reason="unreadable", sha256=None, path=None)
    )
    assert catalog.get("o/a").revision == "r2"  # a failure takes nobody's place
    catalog.record(revision("r4", "d", status="rejected", reason="dora", sha256=None, path=None))
    assert catalog.get("o/a").revision == "r4"
    assert catalog.get("o/a@r1").reason == "norm_out_of_range"
    assert catalog.get("sha256:" + "b" * 8).reason == "superseded"
    assert [row.revision for row in catalog.revisions_of(catalog.get("o/a"))] == ["r3", "r2", "r1"]


def test_what_a_name_forgets(catalog: Catalog) -> None:
    def fill() -> None:
        for number, digit in ((1, "a"), (2, "b"), (3, "c")):
            catalog.record(revision(f"r{number}", digit))
        catalog.record(revision("r3", "c", pool="q"))
        catalog.record(adapter("other", "e"))

    for name, gone in (
        ("o/a", {"r1", "r2", "r3"}),
        ("o/a@r1", {"r1"}),
        ("sha256:" + "b" * 8, {"r2"}),
        ("/cache/" + "c" * 64, {"r3"}),
    ):
        fill()
        assert {row.revision for row in catalog.forget(name)} == gone
        assert catalog.find(name) is None
        assert catalog.find("other") is not None


def test_details_are_kept_beside_the_row(catalog: Catalog) -> None:
    document = adapter("a")
    assert catalog.details_of(document) == Details()
    catalog.record(document, details=Details("# Card", MODULES))
    catalog.record(adapter("b", "b"), details=Details("", MODULES))
    assert catalog.details_of(document) == Details("# Card", MODULES)
    assert list(catalog.module_paths().values()) == [sorted(MODULES)]
    catalog.record(document.model_copy(update={"norm": None}))
    assert catalog.details_of(document) == Details("# Card", MODULES)  # still the same weights
    catalog.record(adapter("a", "d"))
    assert catalog.details_of(document) == Details()


def test_what_lacks_derived_columns(catalog: Catalog) -> None:
    for name, digit in (("a", "a"), ("b", "b"), ("c", "c"), ("d", "d")):
        catalog.record(adapter(name, digit), details=Details("", MODULES))
    catalog.record(rejected("e"))
    assert catalog.lacking_derived() == []
    catalog.record(adapter("b", "b", norm=None))
    catalog.record(adapter("c", "c"), details=Details("a card alone"))
    assert [row.id for row in catalog.lacking_derived()] == ["b", "c"]
    for document in catalog.lacking_derived():
        catalog.set_derived(document, 1.0, "f" * 16, Details("x", MODULES))
    assert catalog.lacking_derived() == []


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


def test_an_earlier_adapter_takes_the_weights_over(catalog: Catalog, tmp_path: Path) -> None:
    catalog.record(adapter("later", path="/kept/a"), "stamp", Details("A card.", MODULES))
    catalog.record(rejected("third", "duplicate", sha256="a" * 64))
    catalog.record(adapter("other", "b"))
    earlier = adapter("earlier", path="/kept/b")
    catalog.record(earlier, instead_of=[catalog.get("later")])
    assert catalog.holder_of("a" * 64, "none") == "earlier"
    assert catalog.holders_of("a" * 64, "none") == [catalog.get("earlier")]
    for name in ("later", "third"):
        row = catalog.get(name)
        assert (row.status, row.reason, row.path) == ("rejected", "duplicate", None)
        assert row.detail == "its weights are byte for byte those of earlier"
    assert catalog.details_of(catalog.get("later")) == Details()
    assert catalog.unchanged("folder", catalog.get("later").origin, "stamp") is not None
    assert catalog.get("other").status == "accepted"
    check_texts(tmp_path / "home" / "catalog.sqlite")


@pytest.fixture
def filled(catalog: Catalog) -> Catalog:
    catalog.record(adapter("a", "a", norm=3.0, license="mit"))
    catalog.record(
        adapter(
            "b",
            "b",
            norm=None,
            rank=RankRange(min=2, max=2),
            license=None,
            author="mira",
            likes=5,
            created_at="2025-01-01T00:00:00+00:00",
            last_modified="2025-03-01T00:00:00+00:00",
        )
    )
    catalog.record(
        adapter(
            "c",
            "c",
            source="hub",
            norm=1.0,
            target_modules=["down_proj"],
            base_model="org/x",
            likes=2,
            created_at="2025-02-01T00:00:00+00:00",
            last_modified="2025-03-02T00:00:00+00:00",
        )
    )
    catalog.record(rejected("d", detail="it uses DoRA", license="other, BSD-3-Clause"))
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
        ({"license": "bsd-3-clause", "status": None}, ["d"]),
        ({"license": "bsd", "status": None}, []),
        ({"min_rank": 3}, ["a", "c"]),
        ({"min_rank": 5}, []),
        ({"max_rank": 7}, ["b"]),
        ({"target_module": "q_proj"}, ["a", "b"]),
        ({"target_module": "proj"}, []),
        ({"search": "DORA", "status": None}, ["d"]),
        ({"search": "dora", "status": "rejected", "sort": "id"}, ["d"]),
        ({"search": "%"}, []),
        ({"search": "pool/a"}, ["a"]),
        ({"author": "MIRA"}, ["b"]),
        ({"source": "hub"}, ["c"]),
        ({"source": "folder", "license": "mit"}, ["a"]),
        ({"sort": "-likes"}, ["b", "c", "a"]),
        ({"sort": "-created"}, ["c", "b", "a"]),
        ({"sort": "modified"}, ["b", "c", "a"]),
        ({"license": "\udcff"}, []),
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
    with pytest.raises(InputError, match="nothing is searched for"):
        filled.query(AdapterQuery(sort="relevance"))


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
    assert stats.alpha_over_rank == {"2": 2, "8": 1}


def test_the_funnel_follows_the_checks(catalog: Catalog) -> None:
    catalog.record(adapter("a", "a", pool="p"))
    catalog.record(adapter("a", "a", pool="q"))
    for number in range(3):
        catalog.record(rejected(f"dora {number}", pool="p"))
    catalog.record(rejected("base", "wrong_base", pool="p", base_model="other"))
    catalog.record(rejected("odd", "of_a_plugin", pool="p"))
    catalog.record(rejected("late", "unreadable", status="failed", pool="p"))
    stats = catalog.statistics("p", ["dora", "wrong_base", "dora"])
    assert stats.found == 7
    assert [(step.reason, step.adapters, step.left) for step in stats.funnel] == [
        ("dora", 3, 4),
        ("wrong_base", 1, 3),
        ("of_a_plugin", 1, 2),
        ("unreadable", 1, 1),
    ]
    assert stats.adapters == 1
    other_order = catalog.statistics("p", ["wrong_base", "dora"])
    assert [step.reason for step in other_order.funnel][:2] == ["wrong_base", "dora"]
    assert catalog.statistics().adapters == 2
    assert catalog.statistics().size_bytes == 100  # one file for two base models


def test_an_adapter_counts_in_one_revision(catalog: Catalog) -> None:
    catalog.record(revision("r1", "a", status="rejected", reason="dora"))
    catalog.record(revision("r2", "b"))
    catalog.record(revision("r3", "c"))
    assert catalog.statistics().counts == {"accepted": 1}
    catalog.record(revision("r4", "d", status="failed", reason="unreadable"))
    assert catalog.statistics().counts == {"accepted": 1}
    catalog.record(revision("r5", "e", status="rejected", reason="non_finite"))
    assert catalog.statistics().reasons == {"non_finite": 1}


def test_changes_to_a_row(filled: Catalog) -> None:
    filled.set_derived(filled.get("b"), 7.0, "0" * 16)
    assert (filled.get("b").norm, filled.get("b").fingerprint) == (7.0, "0" * 16)
    filled.record(adapter("a", "a"), stamp="one")
    filled.set_failed(filled.get("a"), "missing", "gone")
    failed = filled.get("a")
    assert (failed.status, failed.reason, failed.path) == ("failed", "missing", None)
    assert filled.unchanged("folder", failed.origin, "one") is None
    assert [gone.id for gone in filled.forget("c")] == ["c"]
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


def test_writers_and_readers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "catalog.sqlite"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_write_and_list, args=(file, n, barrier)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    with Catalog(file) as catalog:
        assert len(ids(catalog)) == 40
        assert len(ids(catalog, search="shared")) == 40
        assert len(catalog.module_paths()) == 1
    check_texts(file)


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


def _write_and_list(file: Path, number: int, barrier: Any) -> None:
    barrier.wait(20)
    with Catalog(file) as catalog:
        for n in range(10):
            name = f"{number}/{n}"
            catalog.record(adapter(name, str(number)), details=Details("shared words", MODULES))
            assert len([one for one in ids(catalog) if one.startswith(f"{number}/")]) == n + 1
            assert name in ids(catalog, search="shared words", sort="id")
            assert catalog.statistics().adapters >= n + 1
            if n == 5:
                catalog.forget(name)
                catalog.record(adapter(name, str(number)), details=Details("shared", MODULES))
