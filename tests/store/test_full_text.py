"""What a search finds, and that the full-text index never falls out of step with the rows."""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.index import check_texts

from recycle_cli.records import AdapterDocument
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.details import Details

CARDS = {
    "mira/sst2-smol": "A sentiment classifier trained on SST2. Licensed for research.",
    "lab/haiku": "Écrit des haïkus; writes poems about 猫 and rain",
    "lab/q_proj-only": "sentiment of poems, trained twice",
}


def document(name: str, status: str = "accepted", revision: str = "r") -> AdapterDocument:
    return AdapterDocument(
        id=name,
        source="hub",
        origin=name,
        revision=revision,
        pool="org/base",
        status=status,
        sha256=(name.encode().hex() + revision.encode().hex() + "0" * 64)[:64],
        path="/cache/x" if status == "accepted" else None,
        reason=None if status == "accepted" else "dora",
        detail=None if status == "accepted" else "it rescales columns",
        tags=["peft", "region:us"] if "lab" in name else ["peft", "text-classification"],
    )


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    catalog = Catalog(tmp_path_factory.mktemp("index") / "catalog.sqlite")
    for name, card in CARDS.items():
        catalog.record(document(name), details=Details(card))
    catalog.record(document("shop/columns", "rejected"))
    return catalog


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("sentiment", ["lab/q_proj-only", "mira/sst2-smol"]),
        ("SENTIMENT trained", ["lab/q_proj-only", "mira/sst2-smol"]),
        ("sentiment haiku", []),
        ("haiku rain", ["lab/haiku"]),  # one word in the id, one in the card
        ("ecrit", ["lab/haiku"]),
        ("haïku", ["lab/haiku"]),
        ("猫", ["lab/haiku"]),
        ("poem", []),
        ("poem*", ["lab/haiku", "lab/q_proj-only"]),
        ('"sentiment of poems"', ["lab/q_proj-only"]),
        ('"poems of sentiment"', []),
        ('"sentiment of poems" twice', ["lab/q_proj-only"]),
        ("q_proj", ["lab/q_proj-only"]),
        ("text-classification", ["mira/sst2-smol", "shop/columns"]),
        ("region:us", ["lab/haiku", "lab/q_proj-only"]),
        ("t2-sm", ["mira/sst2-smol"]),  # a piece of an id
        ("rescales", ["shop/columns"]),
        # no syntax but words
        ("sentiment NOT trained", []),
        ("sentiment OR haiku", []),
        ("id:haiku", []),
        ("NEAR(sentiment poems)", []),
        ("sentiment )", ["lab/q_proj-only", "mira/sst2-smol"]),
        ('"sentiment', ["lab/q_proj-only", "mira/sst2-smol"]),
        ("^sentiment", ["lab/q_proj-only", "mira/sst2-smol"]),
        ('" sentiment "', ["lab/q_proj-only", "mira/sst2-smol"]),
        ("%", []),
        ("*", []),
        ('""', []),
    ],
)
def test_what_a_search_finds(catalog: Catalog, search: str, found: list[str]) -> None:
    for sort in ("id", "relevance"):
        rows = catalog.query(AdapterQuery(search=search, status=None, sort=sort))
        assert sorted(row.id for row in rows) == found


def test_the_best_match_comes_first(catalog: Catalog) -> None:
    """A word of the id counts more than one of a card; what only holds the text comes last."""
    catalog.record(document("lab/poems"), details=Details("nothing of note"))
    catalog.record(document("lab/mypoems"), details=Details(""))
    ids = [row.id for row in catalog.query(AdapterQuery(search="poems"))]
    assert ids[0] == "lab/poems"
    assert ids[-1] == "lab/mypoems"
    assert set(ids[1:-1]) == {"lab/haiku", "lab/q_proj-only"}
    backwards = [row.id for row in catalog.query(AdapterQuery(search="poems", sort="-relevance"))]
    assert backwards[:-1] == ids[:-1][::-1]
    catalog.forget("lab/poems")
    catalog.forget("lab/mypoems")


def test_an_empty_search_asks_nothing(catalog: Catalog) -> None:
    assert len(catalog.query(AdapterQuery(search=""))) == len(CARDS)


WORDS = st.lists(
    st.sampled_from(
        ["AND", "NOT", "id", ":", '"', "*", "(", ")", "{", "^", "+", "-", "cat", "\0", "'"]
    )
    | st.text(max_size=3)
).map(" ".join)


@settings(max_examples=300)
@given(WORDS | st.text(alphabet=st.characters(), max_size=30))
def test_no_search_is_an_error(catalog: Catalog, search: str) -> None:
    for sort in ("id", None):
        catalog.query(AdapterQuery(search=search, sort=sort))


NAMES = st.sampled_from(["a/one", "b/two"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["record", "keep", "reject", "fail", "forget", "derive"]),
        NAMES,
        st.sampled_from(["r1", "r2"]),
        st.sampled_from(["", "a cat", "a dog and a cat"]),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(STEPS)
def test_it_stays_in_step(steps: list[tuple[str, str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "catalog.sqlite"
        with Catalog(file) as catalog:
            for step, name, revision, card in steps:
                one = document(name, revision=revision)
                if step == "record":
                    catalog.record(one, details=Details(card))
                elif step == "keep":
                    catalog.record(one)
                elif step == "reject":
                    catalog.record(document(name, "rejected", revision), details=Details(card))
                elif step == "fail":
                    catalog.set_failed(one, "missing", "its folder has gone")
                elif step == "derive":
                    catalog.set_derived(one, 1.0, "f", Details(card))
                elif catalog.find(name):
                    catalog.forget(name)
        check_texts(file)
        with closing(sqlite3.connect(file)) as connection:
            by_scan = connection.execute(
                "SELECT count(*) FROM searchable WHERE card LIKE '%cat%'"
            ).fetchone()
            by_index = connection.execute(
                "SELECT count(*) FROM texts WHERE texts MATCH 'card:cat'"
            ).fetchone()
        assert by_index == by_scan
