import fcntl
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from recycle_cli.lora.folder import WEIGHTS_FILE
from recycle_cli.store.room import bytes_kept
from recycle_cli.store.unfinished import being_written, sweep, unfinished_folder


def _write_until_killed(cache: Path, ready: Event) -> None:
    with unfinished_folder(cache) as folder:
        (folder / WEIGHTS_FILE).write_bytes(bytes(100))
        ready.set()
        time.sleep(60)


def test_what_a_writer_left_goes_as_soon_as_it_is_dead(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_write_until_killed, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(30)
        (folder,) = tmp_path.iterdir()
        assert sweep(tmp_path, 0.0) == 0
        assert list(being_written(tmp_path)) == [folder]
        assert bytes_kept(tmp_path) == 100
    finally:
        process.kill()
        process.join()
    assert list(being_written(tmp_path)) == []
    assert bytes_kept(tmp_path) == 0
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_locked_within_its_block_and_gone_behind_it(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path) as one, unfinished_folder(tmp_path) as other:
        assert one != other
        assert sweep(tmp_path, 0.0) == 0
        one.rename(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_a_file_that_looks_like_one_goes(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-x").write_text("")
    (tmp_path / "other").write_text("")
    assert sweep(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_where_there_are_no_locks_age_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with unfinished_folder(tmp_path) as folder:
        assert sweep(tmp_path) == 0
        assert list(being_written(tmp_path)) == [folder]
        day_before = time.time() - 25 * 3600
        os.utime(folder, (day_before, day_before))
        assert sweep(tmp_path) == 1
