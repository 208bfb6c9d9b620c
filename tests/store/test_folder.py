import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycle_cli.store.folder import (
    Card,
    FoundFolder,
    find_adapters,
    parse_card,
    read_card,
    with_versions,
)


def put_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def ids_under(root: Path, skip: tuple[Path, ...] = ()) -> list[str]:
    return [found.id for found in find_adapters(root, skip)]


def test_every_folder_with_a_config_is_found_in_order(tmp_path: Path) -> None:
    for name in ("b/two", "a", "a/checkpoint-20", "a/checkpoint-100", "c/x/y"):
        put_config(tmp_path / name)
    (tmp_path / "empty").mkdir()
    expected = ["a", "a/checkpoint-100", "a/checkpoint-20", "b/two", "c/x/y"]
    assert ids_under(tmp_path) == expected
    assert ids_under(tmp_path, (tmp_path / "c" / "x",)) == expected[:-1]


def versions_under(root: Path, *names: str) -> list[tuple[str, str | None, str | None]]:
    """Puts adapters there; id, revision and the later version of each, in order."""
    for name in names:
        put_config(root / name)
    return [(one.id, one.revision, one.newer) for one in with_versions(find_adapters(root))]


def test_checkpoints_beside_the_finished_adapter_are_its_versions(tmp_path: Path) -> None:
    names = ("a", "a/checkpoint-20", "a/checkpoint-100", "b")
    assert versions_under(tmp_path, *names) == [
        ("a", None, None),
        ("a", "checkpoint-100", "a"),
        ("a", "checkpoint-20", "a"),
        ("b", None, None),
    ]


def test_of_checkpoints_alone_the_one_with_the_highest_number_counts(tmp_path: Path) -> None:
    names = ("run/checkpoint-9", "run/checkpoint-100", "run/checkpoint-20")
    assert versions_under(tmp_path, *names) == [
        ("run", "checkpoint-100", None),
        ("run", "checkpoint-20", "run@checkpoint-100"),
        ("run", "checkpoint-9", "run@checkpoint-100"),
    ]


def test_a_checkpoint_alone_is_a_version_too(tmp_path: Path) -> None:
    assert versions_under(tmp_path, "x/y/checkpoint-5") == [("x/y", "checkpoint-5", None)]


def test_trainings_side_by_side_have_versions_of_their_own(tmp_path: Path) -> None:
    names = ("a/checkpoint-1", "a/checkpoint-2", "b/checkpoint-3")
    assert versions_under(tmp_path, *names) == [
        ("a", "checkpoint-1", "a@checkpoint-2"),
        ("a", "checkpoint-2", None),
        ("b", "checkpoint-3", None),
    ]


def test_the_root_may_be_a_training(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    assert versions_under(root, "checkpoint-1", "checkpoint-2") == [
        ("mine", "checkpoint-1", "mine@checkpoint-2"),
        ("mine", "checkpoint-2", None),
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint", "checkpoint-", "checkpoint-last", "my-checkpoint-5", "checkpoint-5-old"),
        *("Checkpoint-5", "checkpoint-1234567890", "checkpoint--5", "checkpoint_5"),
        "checkpoint-\u0665",
    ],
)
def test_what_only_looks_like_a_checkpoint_is_an_adapter_of_its_own(
    tmp_path: Path, name: str
) -> None:
    assert versions_under(tmp_path, "a", f"a/{name}") == [
        ("a", None, None),
        (f"a/{name}", None, None),
    ]


def test_the_root_itself_goes_by_its_own_name(tmp_path: Path) -> None:
    assert ids_under(put_config(tmp_path / "mine")) == ["mine"]


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    outside = put_config(tmp_path / "outside")
    inside = put_config(tmp_path / "root" / "inside")
    (tmp_path / "root" / "out").symlink_to(outside)
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "twin").symlink_to(inside)
    assert ids_under(tmp_path / "root") == ["inside"]


def test_a_root_that_is_a_link_is_searched(tmp_path: Path) -> None:
    put_config(tmp_path / "real" / "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert ids_under(tmp_path / "link") == ["one"]


def test_names_that_no_terminal_should_see_are_cleaned(tmp_path: Path) -> None:
    put_config(tmp_path / "evil\x1b[2J")
    put_config(tmp_path / "\udcff")
    found = list(find_adapters(tmp_path))
    assert [one.id for one in found] == ["evil\ufffd[2J", "\ufffd"]
    assert [one.folder.is_dir() for one in found] == [True, True]
    assert all(one.origin.isprintable() for one in found)


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("", Card()),
        ("# no front matter", Card()),
        ("---\nlicense: mit\n", Card()),
        ("---\nlicense: mit\nbase_model: a/b\n---\ntext", Card("mit", ("a/b",))),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", Card("mit")),
        (
            "---\nlicense: [mit, apache-2.0]\nbase_model: [a/b, c]\n---",
            Card("mit, apache-2.0", ("a/b", "c")),
        ),
        ("---\nlicense: no\n---", Card("no")),
        ("---\nlicense: 2024-13-45\n---", Card("2024-13-45")),
        ("---\nlicense: {a: b}\nbase_model: [[x], {y: z}]\n---", Card()),
        ("---\n- license\n---", Card()),
        ("---\nlicense: [\n---", Card()),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---", Card("ls")),
        ('---\nlicense: "\\UFFFFFFFF"\n---', Card()),
        ("---\nlicense: " + "[" * 30_000 + "\n---", Card()),
        ('---\nlicense: "a\\x1b[2Jb"\n---', Card("a\ufffd[2Jb")),
    ],
)
def test_cards_are_read_as_far_as_they_make_sense(text: str, card: Card) -> None:
    assert parse_card(text) == card


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("abl:-[]{}&*!|>'\"\\\n #%@`,?U0F<=")), max_size=60))
def test_no_card_raises(text: str) -> None:
    assert isinstance(parse_card(f"---\n{text}\n---\n"), Card)


def test_a_card_is_read_from_inside_the_root_only(tmp_path: Path) -> None:
    secret = tmp_path / "secret.md"
    secret.write_text("---\nlicense: leaked\n---")
    folder = put_config(tmp_path / "root" / "one")
    (folder / "README.md").symlink_to(secret)
    assert read_card(FoundFolder("one", folder, tmp_path / "root")) == (Card(), "")
    assert read_card(FoundFolder("one", folder, tmp_path))[0] == Card("leaked")


def test_a_card_is_read_up_to_its_limit(tmp_path: Path) -> None:
    folder = put_config(tmp_path / "one")
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n" + b"\xff" * 200_000)
    card, text = read_card(FoundFolder("one", folder, tmp_path))
    assert card.license == "mit"
    assert len(text) == 64 * 1024


def test_a_link_that_leads_to_itself_is_no_card(tmp_path: Path) -> None:
    folder = put_config(tmp_path / "one")
    (folder / "README.md").symlink_to(folder / "README.md")
    assert read_card(FoundFolder("one", folder, tmp_path)) == (Card(), "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    locked = put_config(tmp_path / "locked")
    put_config(tmp_path / "open")
    locked.chmod(0)
    try:
        assert ids_under(tmp_path) == ["open", "locked"]
        assert read_card(FoundFolder("locked", locked, tmp_path)) == (Card(), "")
    finally:
        locked.chmod(0o700)


def test_checkpoints_are_versions_of_one_adapter(tmp_path: Path) -> None:
    """The parent is the latest where it is an adapter, else the one that went on longest."""
    root = tmp_path.resolve() / "pool"
    for name in ("done", "done/checkpoint-20", "going/checkpoint-9", "going/checkpoint-100"):
        put_config(root / name)
    put_config(root / "going/checkpoint-best")
    found = {
        one.folder.relative_to(root).as_posix(): (one.id, one.revision, one.newer)
        for one in with_versions(find_adapters(root))
    }
    assert found == {
        "done": ("done", None, None),
        "done/checkpoint-20": ("done", "checkpoint-20", "done"),
        "going/checkpoint-9": ("going", "checkpoint-9", "going@checkpoint-100"),
        "going/checkpoint-100": ("going", "checkpoint-100", None),
        "going/checkpoint-best": ("going/checkpoint-best", None, None),
    }


def test_a_checkpoint_that_is_crawled_itself_is_an_adapter(tmp_path: Path) -> None:
    put_config(tmp_path / "checkpoint-5")
    (one,) = with_versions(find_adapters(tmp_path / "checkpoint-5"))
    assert (one.id, one.revision, one.newer) == ("checkpoint-5", None, None)
