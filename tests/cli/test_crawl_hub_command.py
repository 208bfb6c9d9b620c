"""`recycle crawl hub` in processes of its own, the Hub named by the environment."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.command import RECYCLE, Done, assert_refused
from support.hub import Hub, Repository
from support.strangers import BASE_MODEL, make_pool

LINE = ["crawl", "hub", "--base-model", BASE_MODEL, "--json"]
KILLS = 5


@pytest.fixture(scope="module")
def hub(pico_folder: Path) -> Iterator[Hub]:
    """The strangers, and the base model that they were trained on."""
    base = Repository.from_folder(BASE_MODEL, pico_folder)
    with Hub([base, *make_pool(280).repositories], page_size=100) as hub:
        yield hub


class Command:
    """The command, with a home of its own."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **hub.environment,
            "RECYCLE_HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hf"),
        }

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*RECYCLE, *words],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> Done:
        process = self.start(*words)
        stdout, stderr = process.communicate()
        return Done(process.returncode, stdout, stderr)

    def rows(self) -> list[dict[str, Any]]:
        """The index, but for where the cache lies."""
        rows = self.run("index", "list", "--status", "all", "--json").documents
        for row in rows:
            row["path"] = Path(row["path"]).name if row["path"] else None
        return rows


@pytest.fixture(scope="module")
def undisturbed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    command = Command(hub, tmp_path_factory.mktemp("undisturbed"))
    done = command.run(*LINE)
    assert done.exit_code == 0, done.stderr
    *adapters, summary = done.documents
    assert summary["counts"]["accepted"] > 90
    rows = command.rows()
    assert len(rows) == len(adapters)
    return rows


def test_killed_five_times_it_ends_as_if_nothing_had_been(
    hub: Hub, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """And nothing that was accepted is fetched twice."""
    command, random = Command(hub, tmp_path), Random(0)
    hub.reset_log()
    said: list[str] = []
    for _ in range(KILLS):
        process = command.start(*LINE)
        assert process.stdout is not None
        wanted = random.randint(1, 40)
        for _ in range(wanted):
            said.append(process.stdout.readline())
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    accepted = {json.loads(line)["id"] for line in said if '"accepted"' in line}
    assert accepted
    assert command.run(*LINE).exit_code == 0
    assert command.rows() == undisturbed
    # The first range tells the header; what is behind it is asked for when an adapter is kept.
    cards = [request.path for request in hub.requests if request.path.endswith("README.md")]
    for name in accepted:
        assert sum(path.startswith(f"/{name}/") for path in cards) <= 2


def test_two_at_once_end_as_one(
    hub: Hub, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = Command(hub, tmp_path)
    both = [command.start(*LINE) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    assert command.rows() == undisturbed


def test_an_interrupt_ends_it_at_once(hub: Hub, tmp_path: Path) -> None:
    process = Command(hub, tmp_path).start(*LINE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    process.communicate()
    assert process.returncode == 130
    assert time.monotonic() - start < 5


def test_it_is_shown_to_people(hub: Hub, tmp_path: Path) -> None:
    done = Command(hub, tmp_path).run(*LINE[:-1], "--limit", "20", "--dry-run")
    assert done.exit_code == 0
    assert "requests to the Hub" in done.stdout
    assert "rate limit has one wait 0 s at least" in done.stdout
    assert not (tmp_path / "home/adapters").exists()


def test_ids_from_a_file(hub: Hub, tmp_path: Path) -> None:
    command = Command(hub, tmp_path)
    first = make_pool(280).of_kind("plain").repository
    (tmp_path / "ids.txt").write_text(f"# a list\n\n{first.id}@{first.sha}\nlab/nobody\n")
    *adapters, _ = command.run(*LINE, "--ids-from", "ids.txt").documents
    verdicts = [one["reason"] or one["status"] for one in adapters]
    assert verdicts == ["accepted", "not_found"]
    hub.reset_log()
    (tmp_path / "ids.txt").write_text(f"{first.id}@{first.sha}\n")
    assert command.run(*LINE, "--ids-from", "ids.txt").exit_code == 0
    assert not any(first.id in request.target for request in hub.requests)


def test_a_cache_that_is_full_is_said(hub: Hub, tmp_path: Path) -> None:
    done = Command(hub, tmp_path).run(*LINE, "--max-cache", "20kB")
    assert done.exit_code == 1
    assert "do not fit into the adapter cache, which may take 20000 bytes" in done.stderr
    assert "--max-cache" in done.stderr.splitlines()[-1]
    files = (tmp_path / "home/adapters").glob("*/*.safetensors")
    assert sum(file.stat().st_size for file in files) <= 20_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ids-from", "ids.txt"], ("line 2 of ids.txt is 'no id'", "owner/name")),
        (["--ids-from", "none.txt"], ("none.txt cannot be read",)),
        (["--ids-from", "empty.txt"], ("holds no id",)),
        (["--ids-from", "ids.txt", "--author", "lab"], ("--author and --ids-from",)),
        (["--max-cache", "much"], ("--max-cache is 'much'", "8GB")),
    ],
)
def test_what_makes_no_sense_is_refused(
    hub: Hub, tmp_path: Path, words: list[str], said: tuple[str, ...]
) -> None:
    (tmp_path / "ids.txt").write_text("lab/one\nno id\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    assert_refused(Command(hub, tmp_path).run(*LINE, *words), 2, *said)


@pytest.mark.parametrize("option", [["--author", "a"], ["--workers", "2"], ["--ids-from", "x"]])
def test_options_of_the_hub_are_none_of_a_folder(
    hub: Hub, tmp_path: Path, option: list[str]
) -> None:
    done = Command(hub, tmp_path).run("crawl", ".", *option)
    assert_refused(done, 2, f"{option[0]} is about the Hub")


def test_offline_is_said(hub: Hub, tmp_path: Path) -> None:
    assert_refused(Command(hub, tmp_path).run("--offline", *LINE), 2, "crawl hub needs the network")
