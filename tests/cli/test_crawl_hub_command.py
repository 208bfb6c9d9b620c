"""`recycle crawl hub` as a process of its own, killed, doubled, refused and out of luck."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.command import RECYCLE, Done, Recycle, assert_refused
from support.crawling import CONFIG, LARGE, WEIGHTS, adapter, online, rows_of, uploaded_again
from support.hub import Fault, Hub, Repository, faults
from support.hub.messages import Request
from support.strangers import BASE_MODEL, Pool, make_pool

CRAWL = ("crawl", "hub", "--base-model", BASE_MODEL, "--json")
IMPATIENT = """
from recycle_cli.store import hub_requests
hub_requests.PATIENCE = hub_requests.Patience(0.5, 0.5, rate_over_s=2.0)
from recycle_cli.cli.app import main
main()
"""
"""The command, with a limit on every wait that a test has time for."""


class Running:
    """A process, whose output goes to files: nobody reads it meanwhile."""

    def __init__(self, words: list[str], environment: dict[str, str], files: Path) -> None:
        self._out, self._err = files.with_suffix(".out"), files.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                words, env=environment, cwd=files.parent, stdout=out, stderr=err
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ended(self) -> Done:
        self._process.wait(120)
        return Done(self._process.returncode, self._out.read_text(), self._err.read_text())


class Place:
    """A Hub with a base model on it, and processes that use it."""

    def __init__(self, stand: Hub, folder: Path) -> None:
        self.stand, self.folder, self.started = stand, folder, 0

    def start(self, home: str, *words: object, command: Sequence[str] = RECYCLE) -> "Running":
        environment = {
            **self.stand.environment,
            "HF_HOME": str(self.folder / "hf"),
            "RECYCLE_HOME": str(self.folder / home),
        }
        self.started += 1
        return Running([*command, *map(str, words)], environment, self.folder / str(self.started))

    def run(self, home: str, *words: object) -> Done:
        return self.start(home, *words).ended()

    def rows(self, home: str) -> list[tuple[Any, ...]]:
        """What must not depend on how the crawl went."""
        names = ("id", "revision", "status", "reason", "sha256", "pool")
        return [tuple(row[name] for name in names) for row in rows_of(self.folder / home)]

    def kept(self, home: str) -> set[str]:
        return {path.name for path in (self.folder / home / "adapters").glob("[!.]*")}


def asked_for(log: Sequence[Request]) -> set[str]:
    """The repositories that were asked for files."""
    return {"/".join(one.parts[:2]) for one in log if one.kind in ("resolve", "storage")}


def base_repository(pico_folder: Path) -> Repository:
    base = Repository.from_folder(BASE_MODEL, pico_folder)
    base.library_name = "transformers"
    return base


# --- hopeless repositories, crawled meanwhile -----------------------------------------------

HOPELESS = {
    "hangs": Fault(f"/lab/hangs/resolve/.*{CONFIG}", faults.hanging()),
    "hangs-late": Fault("/lab/hangs-late/[0-9a-f]{64}", faults.hanging(), skip=1),
    "ill": Fault(f"/lab/ill/resolve/.*{CONFIG}", faults.server_error()),
    "ill-storage": Fault("/lab/ill-storage/[0-9a-f]{64}", faults.server_error(500)),
    "drips": Fault("/lab/drips/[0-9a-f]{64}", faults.dripping(100, 0.2), skip=1),
    "limits-long": Fault(f"/lab/limits-long/resolve/.*{CONFIG}", faults.too_many_requests(3600)),
    "limits": Fault(f"/lab/limits/resolve/.*{WEIGHTS}", faults.too_many_requests(2)),
}


@pytest.fixture(scope="module", autouse=True)
def hopeless(
    pico_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], tuple[Place, Done]]]:
    """A crawl of repositories whose files never come, which takes half a minute of waiting: it is
    begun with the first test of this file, and asked for by the last ones."""
    repositories = [adapter(f"lab/{name}", n, **LARGE) for n, name in enumerate(HOPELESS)]
    repositories += [base_repository(pico_folder), adapter("lab/well", 9)]
    with Hub(repositories, faults=HOPELESS.values()) as stand:
        place = Place(stand, tmp_path_factory.mktemp("hopeless"))
        command = [sys.executable, "-c", IMPATIENT]
        process = place.start("home", *CRAWL, command=command)
        done: list[Done] = []

        def result() -> tuple[Place, Done]:
            if not done:
                done.append(process.ended())
            return place, done[0]

        try:
            yield result
        finally:
            process.kill()


# --- kills, and crawls side by side ---------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(300, seed=1)


@pytest.fixture(scope="module")
def place(
    pool: Pool, pico_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    repositories = [*pool.repositories, base_repository(pico_folder)]
    with Hub(repositories, page_size=1000) as stand:
        yield Place(stand, tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def undisturbed(place: Place, pool: Pool) -> list[tuple[Any, ...]]:
    """The index after a crawl that nothing happened to."""
    done = place.run("undisturbed", *CRAWL)
    assert done.exit_code == 0, done.stderr
    assert done.documents[-1]["reasons"] == {
        code: count
        for code, count in pool.counts(pool.listed()).items()
        if code not in ("accepted", "private")
    }
    return place.rows("undisturbed")


def test_a_crawl_that_is_killed_five_times_ends_as_if_it_had_not(
    place: Place, undisturbed: list[tuple[Any, ...]]
) -> None:
    random = Random(5)
    held: set[str] = set()
    for _ in range(5):
        place.stand.reset_log()
        process = place.start("killed", *CRAWL)
        moment = random.randint(5, 70)
        while len(asked_for(place.stand.requests)) < moment and process.runs:
            time.sleep(0.002)
        process.kill()
        assert not held & asked_for(place.stand.requests)
        held = {row[0] for row in place.rows("killed") if row[2] == "accepted"}
        time.sleep(0.1)  # for answers to a process that is no more
    assert 0 < len(held) < len(undisturbed)
    place.stand.reset_log()
    done = place.run("killed", *CRAWL)
    assert done.exit_code == 0, done.stderr
    assert not held & asked_for(place.stand.requests)
    assert place.rows("killed") == undisturbed
    assert place.kept("killed") == place.kept("undisturbed")


def test_two_crawls_at_once_end_as_one(place: Place, undisturbed: list[tuple[Any, ...]]) -> None:
    processes = [place.start("both", *CRAWL) for _ in range(2)]
    for process in processes:
        done = process.ended()
        assert done.exit_code == 0, done.stderr
        assert "error" not in done.stderr
    assert place.rows("both") == undisturbed
    assert place.kept("both") == place.kept("undisturbed")
    assert not list((place.folder / "both/adapters").glob(".*"))


def late_pool(pico_folder: Path) -> list[Repository]:
    """Adapters, the first of which were uploaded again, once with another alpha."""
    config, weights = adapter("lab/config", 1), adapter("lab/weights", 2)
    again = [
        uploaded_again("shop/config", config, "2025-02-01"),
        uploaded_again("shop/config-again", config, "2025-02-02"),
        uploaded_again("shop/weights", weights, "2025-02-03", lora_alpha=2),
    ]
    others = [adapter(f"lab/{n}", n + 10) for n in range(40)]
    return [config, weights, *again, *others, base_repository(pico_folder)]


def test_a_crawl_that_is_killed_behind_files_that_hang_keeps_all_others(
    pico_folder: Path, tmp_path: Path
) -> None:
    hanging = [
        Fault(f"/lab/config/resolve/.*{CONFIG}", faults.hanging()),
        Fault("/lab/weights/[0-9a-f]{64}", faults.hanging()),
    ]
    with Hub(late_pool(pico_folder), faults=hanging) as stand:
        place = Place(stand, tmp_path)
        process = place.start("killed", *CRAWL)
        while len(place.rows("killed")) < 43 and process.runs:
            time.sleep(0.01)
        process.kill()
        states = {row[0]: row[3] or row[2] for row in place.rows("killed")}
        assert states.pop("shop/config-again") == "duplicate"
        assert set(states.values()) == {"accepted"}
        assert len(states) == 42
        stand.faults.clear()
        stand.reset_log()
        both = [place.start(home, *CRAWL) for home in ("killed", "undisturbed")]
        assert [process.ended().exit_code for process in both] == [0, 0]
        reasons = {row[0]: row[3] for row in place.rows("killed") if row[3]}
        assert reasons == dict.fromkeys(
            ("shop/config", "shop/config-again", "shop/weights"), "duplicate"
        )
        assert place.rows("killed") == place.rows("undisturbed")
        assert len(place.kept("killed")) == len(place.kept("undisturbed")) == 42


# --- in this process ------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def test_offline_is_refused(recycle: Recycle) -> None:
    done = recycle("crawl", "hub", succeeds=False)
    assert_refused(done, 2, "needs the network", "HF_HUB_OFFLINE", "crawl a folder")


@pytest.mark.usefixtures("away")
def test_the_offline_option_is_refused(recycle: Recycle) -> None:
    done = recycle("--offline", "crawl", "hub", succeeds=False)
    assert_refused(done, 2, "needs the network", "--offline")


ERRORS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("hub", "--ids-from", "absent.txt"), ("--ids-from absent.txt cannot be read",)),
    (("hub", "--ids-from", "bad.txt"), ("line 4 of bad.txt", "'not an id'", "owner/name")),
    (("hub", "--ids-from", "two.txt"), ("line 1 of two.txt", "'a/b/c'")),
    (("hub", "--ids-from", "odd.txt"), ("line 1 of odd.txt", "'a/b@'")),
    (("hub", "--ids-from", "versions.txt"), ("lines 1 and 3 of versions.txt name a/b at two",)),
    (("hub", "--ids-from", "empty.txt"), ("empty.txt holds no id",)),
    (("hub", "--ids-from", "binary.txt"), ("binary.txt cannot be read",)),
    (("hub", "--ids-from", "."), ("cannot be read",)),
    (("hub", "--ids-from", "good.txt", "--author", "a"), ("--author and --ids-from",)),
    (("hub", "--max-cache", "0"), ("--max-cache is '0'", "500MB")),
    (("hub", "--max-bytes", "0"), ("--max-bytes is '0'", "500MB")),
    (("hub", "--max-bytes", "many"), ("--max-bytes is 'many'",)),
    (("hub", "--base-model", ""), ("the name of the base model is empty",)),
    (("hub", "--also-base", " "), ("--also-base is empty",)),
    (("hub", "--max-cache", "-5GB"), ("--max-cache is '-5GB'",)),
    (("hub", "--max-cache", "lots"), ("--max-cache is 'lots'",)),
    (("folder", "--ids-from", "good.txt"), ("--ids-from is about the Hub", "crawl hub")),
    (("folder", "--author", "a"), ("--author is about the Hub",)),
    (("folder", "--workers", "2"), ("--workers is about the Hub",)),
    (("nowhere",), ("nowhere does not exist", "or hub")),
    (("good.txt",), ("good.txt is no folder",)),
    (("./hub",), ("hub does not exist",)),
]


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(("words", "said"), ERRORS, ids=[" ".join(words) for words, _ in ERRORS])
def test_what_cannot_be_meant_is_refused(
    recycle: Recycle, tmp_path: Path, words: tuple[str, ...], said: tuple[str, ...]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.txt").write_text("a/b\n")
    (tmp_path / "bad.txt").write_text("# ours\na/b\n\nnot an id\n")
    (tmp_path / "two.txt").write_text("a/b/c\n")
    (tmp_path / "odd.txt").write_text("a/b@\n")
    (tmp_path / "versions.txt").write_text("a/b\na/b\na/b@v1\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert_refused(recycle("crawl", *words, succeeds=False), 2, *said)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--workers", "0"), ("--workers", "65"), ("--limit", "0"), ("--max-rank", "x")],
)
@pytest.mark.usefixtures("away")
def test_numbers_out_of_range_are_refused(recycle: Recycle, option: str, value: str) -> None:
    done = recycle("crawl", "hub", option, value, succeeds=False)
    assert done.exit_code == 2
    assert option in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small(recycle: Recycle, away: None, pico_folder: Path) -> Iterator[Callable[..., Done]]:
    """The command on a Hub of three adapters of a base model that is a folder here."""
    repositories = [adapter(f"{owner}/one", n) for n, owner in enumerate(("lab", "shop", "den"))]
    with Hub(repositories) as stand, online(stand.url):

        def run(*words: object, succeeds: bool = True) -> Done:
            return recycle(*words, succeeds=succeeds)

        yield run


def test_a_folder_as_base_goes_by_its_name_on_the_hub(
    small: Callable[..., Done], pico_folder: Path
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--json")
    assert_refused(small(*words, succeeds=False), 2, "is a folder", "--also-base")
    *adapters, summary = small(*words, "--also-base", BASE_MODEL).documents
    assert {one["id"]: one["status"] for one in adapters} == {
        "lab/one": "accepted",
        "shop/one": "accepted",
        "den/one": "accepted",
    }
    assert {one["base_model"] for one in adapters} == {str(pico_folder)}
    assert summary["source"] == "hub"
    assert (summary["requests"], summary["storage_requests"]) == (1 + 9, 3)


def test_a_full_cache_ends_with_exit_1_and_keeps_what_fits(
    recycle: Recycle, away: None, pico_folder: Path, tmp_path: Path
) -> None:
    repositories = [adapter(f"lab/{n}", n, **LARGE) for n in range(5)]
    size = len(repositories[0].newest[WEIGHTS].content)
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL, "--json")
    with Hub(repositories) as stand, online(stand.url):
        limit = int(2.5 * size)
        done = recycle(*words, "--max-cache", limit, succeeds=False)
        error, hint = done.stderr.splitlines()[-2:]
        assert done.exit_code == 1
        assert error.startswith("error: 3 adapters do not fit")
        assert hint.startswith("hint: ")
        assert "--max-cache" in hint
        assert "Traceback" not in done.stderr
        kept = {row["id"] for row in rows_of(tmp_path / "home") if row["status"] == "accepted"}
        assert len(kept) == len(list((tmp_path / "home/adapters").iterdir())) == 2
        stand.reset_log()
        again = recycle(*words, "--max-cache", "1GB")
        assert again.documents[-1]["counts"] == {"accepted": 5}
        assert asked_for(stand.requests) == {one.id for one in repositories} - kept


def test_a_crawl_without_json_shows_what_came_of_it(
    small: Callable[..., Done], pico_folder: Path
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL)
    first, second = small(*words), small(*words)
    assert "3 accepted in" in first.stdout
    assert "10 requests to the Hub, 3 to its storage" in first.stdout
    assert "1 requests to the Hub, 0 to its storage, " in second.stdout
    assert "lab/one" in second.stdout


@pytest.mark.parametrize(
    ("size", "accepted"), [("1kB", 0), ("1000", 0), ("1MB", 3), ("1000000", 3)]
)
def test_sizes_have_units_or_none(
    small: Callable[..., Done], pico_folder: Path, size: str, accepted: int
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL, "--json")
    done = small(*words, "--dry-run", "--max-bytes", size, succeeds=accepted > 0)
    assert done.documents[-1]["counts"].get("accepted", 0) == accepted


def test_a_list_of_ids_is_read_with_its_comments(
    small: Callable[..., Done], pico_folder: Path, tmp_path: Path
) -> None:
    text = "\ufeffshop/one@main\r\n# those of the paper\n\n  shop/one@main \nlab/none\n"
    (tmp_path / "ids.txt").write_text(text, encoding="utf-8")
    words = ("crawl", "--base-model", pico_folder, "--also-base", BASE_MODEL)
    *adapters, _ = small(*words, "--ids-from", "ids.txt", "--json").documents
    assert [(one["id"], one["reason"]) for one in adapters] == [
        ("shop/one", None),
        ("lab/none", "not_found"),
    ]


def test_a_dry_run_tells_what_is_to_come(
    small: Callable[..., Done], pico_folder: Path, tmp_path: Path
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL, "--dry-run")
    said = small(*words, "--author", "den").stdout
    assert "Keeping the 1 accepted ones takes" in said
    assert "3 requests" in said
    assert not (tmp_path / "home/adapters").exists()
    assert not (tmp_path / "home/catalog.sqlite").exists()


def test_when_none_can_be_used_the_reasons_are_shown(
    small: Callable[..., Done], pico_folder: Path
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL)
    done = small(*words, "--license", "wtfpl", succeeds=False)
    assert done.exit_code == 1
    assert "none of the 3 adapters on the Hub can be used" in done.stderr
    assert "license_refused" in done.stdout


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HF_ENDPOINT", "localhost:9", "HF_ENDPOINT is 'localhost:9'"),
        ("HF_ENDPOINT", "http://[::1", "HF_ENDPOINT is 'http://[::1'"),
        ("HF_ENDPOINT", "", "HF_ENDPOINT is ''"),
        ("HF_TOKEN", "hf_b\u00e4d", "HF_TOKEN holds characters"),
    ],
)
def test_an_environment_that_leads_nowhere_is_refused(
    recycle: Recycle, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(name, value)
    assert_refused(recycle("crawl", "hub", succeeds=False), 2, said, "unset it")


def test_what_the_cache_lost_is_fetched_again_by_verify(
    small: Callable[..., Done], pico_folder: Path
) -> None:
    words = ("crawl", "hub", "--base-model", pico_folder, "--also-base", BASE_MODEL, "--json")
    one, two, *_ = small(*words).documents
    shutil.rmtree(one["path"])
    weights = Path(two["path"]) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert small("index", "verify", succeeds=False).exit_code == 3
    small("index", "verify", "--repair")
    small("index", "verify")


# --- the hopeless ones, at last -------------------------------------------------------------


def test_what_never_answers_fails_and_stops_nobody(
    hopeless: Callable[[], tuple[Place, Done]],
) -> None:
    _, done = hopeless()
    assert done.exit_code == 0, done.stderr
    *adapters, summary = done.documents
    assert {one["id"]: one["reason"] or one["status"] for one in adapters} == {
        **{f"lab/{name}": "unreachable" for name in HOPELESS},
        "lab/well": "accepted",
    }
    assert summary["counts"] == {"accepted": 1, "failed": len(HOPELESS)}
    assert "Traceback" not in done.stderr


def test_what_never_answered_was_asked_six_times(
    hopeless: Callable[[], tuple[Place, Done]],
) -> None:
    place, _ = hopeless()
    asked = {name: fault.hits for name, fault in HOPELESS.items()}
    # What comes slowly, or not for an hour, is left for another crawl at once.
    assert asked == {**dict.fromkeys(HOPELESS, 6), "drips": 1, "limits-long": 1}
    assert len(place.kept("home")) == 1
    assert not list((place.folder / "home/adapters").glob(".*"))
