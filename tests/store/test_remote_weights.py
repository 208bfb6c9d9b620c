"""Weights on the Hub, read in pieces."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.crawling import LARGE, WEIGHTS, adapter, online
from support.hub import Fault, Repository, faults
from support.hub import Hub as StandIn
from support.hub.messages import Answer

from recycle_cli.lora.config import AdapterProblem
from recycle_cli.store.hub import Hub
from recycle_cli.store.hub_errors import Unreachable
from recycle_cli.store.remote_weights import FIRST_BYTES, RemoteWeights, Tampered
from recycle_cli.store.safetensors_header import parse_header

STORAGE = "/lab/one/[0-9a-f]{64}"
SMALL = adapter("lab/one").newest[WEIGHTS].content
BIG = adapter("lab/one", **LARGE).newest[WEIGHTS].content
LONG_HEADER = save({"a": torch.ones(2, 3)}, {"note": "x" * 200_000})
Open = Callable[..., RemoteWeights]


class Bench:
    """A Hub with one repository, and its weights."""

    def __init__(self, stand: StandIn) -> None:
        self.stand = stand
        self.hub = Hub(stand.url)

    def weights(self, content: bytes, *happening: Fault) -> RemoteWeights:
        self.stand.add(Repository("lab/one", {WEIGHTS: content}))
        self.stand.faults[:] = happening
        found = self.hub.repository("lab/one")
        self.stand.reset_log()
        return RemoteWeights(self.hub, found)

    @property
    def ranges(self) -> list[str | None]:
        return [one.range for one in self.stand.requests if one.origin == "storage"]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with StandIn() as stand, online(stand.url):
        yield Bench(stand)


def without(*names: str) -> Callable[[Answer], Answer]:
    """The answer without these headers."""
    return lambda answer: replace(
        answer, headers={k: v for k, v in answer.headers.items() if k not in names}
    )


def test_a_small_file_is_one_request(bench: Bench, tmp_path: Path) -> None:
    weights = bench.weights(SMALL)
    length = int.from_bytes(SMALL[:8], "little")
    assert weights.header == parse_header(SMALL[8 : 8 + length], len(SMALL) - 8 - length)
    assert weights.size_bytes == len(SMALL)
    assert weights.announced_sha256 == hashlib.sha256(SMALL).hexdigest()
    assert weights.download(tmp_path / "file") == hashlib.sha256(SMALL).hexdigest()
    assert (tmp_path / "file").read_bytes() == SMALL
    assert bench.ranges == [f"bytes=0-{FIRST_BYTES - 1}"]
    assert bench.stand.counts == {"resolve": 1, "storage": 1}


def test_a_large_file_is_its_start_and_its_rest(bench: Bench, tmp_path: Path) -> None:
    weights = bench.weights(BIG)
    assert weights.header
    assert bench.ranges == [f"bytes=0-{FIRST_BYTES - 1}"]
    weights.download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BIG
    assert bench.ranges[1:] == [f"bytes={FIRST_BYTES}-{len(BIG) - 1}"]
    # The rest comes from where the Hub led at first, which no rate limit counts.
    assert bench.stand.counts == {"resolve": 1, "storage": 2}


def test_a_long_header_is_read_to_its_end_and_no_further(bench: Bench) -> None:
    content = LONG_HEADER + bytes(0)
    weights = bench.weights(content)
    end = 8 + int.from_bytes(content[:8], "little")
    assert set(weights.header) == {"a"}
    assert bench.ranges == [f"bytes=0-{FIRST_BYTES - 1}", f"bytes={FIRST_BYTES}-{end - 1}"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "truncated"),
        (b"\1\0\0", "truncated"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header_too_large"),
        ((2).to_bytes(8, "little") + b"{}x", "bad_header"),
    ],
)
def test_headers_that_are_none(bench: Bench, content: bytes, code: str) -> None:
    with pytest.raises(AdapterProblem) as caught:
        _ = bench.weights(content).header
    assert caught.value.code == code
    assert len(bench.ranges) == 1


def test_a_server_that_ignores_ranges_is_read_all_the_same(bench: Bench, tmp_path: Path) -> None:
    for content in (SMALL, BIG, LONG_HEADER):
        weights = bench.weights(content, Fault(STORAGE, faults.range_ignored()))
        assert weights.header
        weights.download(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content


def test_a_download_goes_on_where_it_broke_off(bench: Bench, tmp_path: Path) -> None:
    weights = bench.weights(BIG, Fault(STORAGE, faults.truncated(100_000), skip=1))
    weights.download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BIG
    starts = range(FIRST_BYTES, len(BIG), 100_000)
    assert bench.ranges[1:] == [f"bytes={start}-{len(BIG) - 1}" for start in starts]


def test_a_download_that_gets_nowhere_is_given_up(bench: Bench, tmp_path: Path) -> None:
    weights = bench.weights(BIG, Fault(STORAGE, faults.truncated(0), skip=1))
    with pytest.raises(Unreachable) as caught:
        weights.download(tmp_path / "file")
    assert caught.value.code == "unreachable"
    assert len(bench.ranges) == 1 + 6


def test_other_bytes_of_the_same_size_are_found_out(bench: Bench, tmp_path: Path) -> None:
    for skip, content in ((0, SMALL), (1, BIG)):
        weights = bench.weights(content, Fault(STORAGE, faults.tampered(), skip=skip))
        assert weights.header
        with pytest.raises(Tampered) as caught:
            weights.download(tmp_path / "file")
        assert caught.value.code == "checksum"


def test_no_byte_beyond_the_size_is_written(bench: Bench, tmp_path: Path) -> None:
    for content in (SMALL, BIG):
        weights = bench.weights(content, Fault(STORAGE, faults.longer(10_000)))
        weights.download(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("size", [1, len(SMALL) - 1, len(SMALL) + 1, 1 << 70])
def test_two_sizes_are_no_size(bench: Bench, size: int) -> None:
    with pytest.raises(Tampered, match="bytes"):
        _ = bench.weights(SMALL, Fault("/resolve/", faults.lying_size(size))).size_bytes


def test_the_size_may_be_announced_once(bench: Bench) -> None:
    weights = bench.weights(SMALL, Fault("/resolve/", without("X-Linked-Size")))
    assert weights.size_bytes == len(SMALL)


def test_where_no_digest_is_announced_it_is_that_of_the_bytes(bench: Bench, tmp_path: Path) -> None:
    weights = bench.weights(BIG, Fault("/resolve/", without("X-Linked-ETag")))
    assert weights.announced_sha256 is None
    assert weights.download(tmp_path / "file") == hashlib.sha256(BIG).hexdigest()


@pytest.mark.parametrize("digest", ["", "abc", '"../../etc"', "W/" + "0" * 64 + "x", "Z" * 64])
def test_a_digest_that_is_none_is_not_taken_for_one(bench: Bench, digest: str) -> None:
    fault = Fault("/resolve/", lambda answer: answer.with_headers(X_Linked_ETag=digest))
    assert bench.weights(SMALL, fault).announced_sha256 is None


def test_a_link_that_has_run_out_is_asked_for_anew(bench: Bench, tmp_path: Path) -> None:
    expired = Fault(STORAGE, lambda _: faults.error(403, "Request has expired"), skip=1, times=1)
    weights = bench.weights(BIG, expired)
    weights.download(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BIG
    assert bench.stand.counts == {"resolve": 2, "storage": 3}


def test_whoever_is_asked_while_it_comes_may_end_it(bench: Bench, tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError("enough")

    with pytest.raises(OSError, match="enough"):
        bench.weights(BIG).download(tmp_path / "file", stop)
    assert len(bench.ranges) == 1
