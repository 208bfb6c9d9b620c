"""Crawls of the stand-in Hub, and what they ask it for."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from support.crawling import (
    CARD,
    CONFIG,
    LARGE,
    WEIGHTS,
    Crawler,
    adapter,
    changed,
    online,
    uploaded_again,
)
from support.folders import added_by_peft, assert_same_update, dense_sum
from support.hub import Fault, Hub, Quota, Repository, faults
from support.hub.messages import Answer
from support.strangers import BASE_MODEL, Pool, base_shapes, make_pool

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import AdapterDocument, CrawlDocument
from recycle_cli.settings import Settings
from recycle_cli.store.cache import damage
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.hub import Hub as Client
from recycle_cli.store.hub_requests import Patience
from recycle_cli.store.unfinished import unfinished_folder
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_keep import fetch_again
from recycle_cli.workflows.crawl_request import CrawlRequest

LISTINGS = 4
"""The base model's name and those of its usual copies."""
NEVER_ASKED = ("gated", "disabled")
"""What the listing itself tells."""
FIRST_BYTES = 131_072
StandIn = Callable[..., Crawler]


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    """Starts a Hub of some repositories, and gives the means to crawl it into a new home."""
    running: list[Hub] = []

    def start(*repositories: Repository, request: dict[str, Any] | None = None, **hub: Any) -> Any:
        stand = Hub(repositories, **hub)
        running.append(stand)
        return Crawler(stand.__enter__(), tmp_path / f"home{len(running)}", **(request or {}))

    yield start
    for stand in running:
        stand.__exit__(None, None, None)


def size_of(repository: Repository) -> int:
    return len(repository.newest[WEIGHTS].content)


def sha_of(repository: Repository) -> str:
    return repository.newest[WEIGHTS].sha256


# --- three hundred strangers ----------------------------------------------------------------


class Grand:
    """Crawls of all strangers: the first, the second, and one of their very commits."""

    def __init__(self, pool: Pool, stand: Hub, home: Path) -> None:
        self.pool = pool
        self.crawler = Crawler(stand, home)
        self.first = self.crawler.crawl()
        self.summary, self.asked = self.crawler.summary, self.crawler.asked
        self.log, self.files_asked = self.crawler.log, self.crawler.files_asked()
        self.kept = self.crawler.kept()
        self.second = self.crawler.crawl()
        self.second_summary, self.second_asked = self.crawler.summary, self.crawler.asked
        ids = tuple(
            f"{one.id}@{one.revision}"
            for one in self.first.values()
            if one.reason not in NEVER_ASKED
        )
        self.pinned = self.crawler.crawl(ids=ids)
        self.pinned_log = self.crawler.log

    def accepted(self) -> dict[str, AdapterDocument]:
        return {name: one for name, one in self.first.items() if one.status == "accepted"}

    def repository(self, name: str) -> Repository:
        return self.crawler.stand.shelves.repositories[name]

    def write(self, name: str, folder: Path) -> Path:
        """The adapter's own configuration and weights, as its author has them."""
        folder.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            (folder / file).write_bytes(self.repository(name).newest[file].content)
        return folder


@pytest.fixture(scope="module")
def grand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grand]:
    pool = make_pool(300)
    with Hub(pool.repositories, page_size=1000) as stand:
        yield Grand(pool, stand, tmp_path_factory.mktemp("grand"))


def test_every_stranger_gets_its_verdict(grand: Grand) -> None:
    verdicts = {name: one.reason or one.status for name, one in grand.first.items()}
    assert verdicts == grand.pool.expected(grand.pool.listed())
    assert {one.status for one in grand.first.values() if one.reason} == {"rejected"}
    assert all(one.detail for one in grand.first.values() if one.reason)


def test_the_reasons_are_counted(grand: Grand) -> None:
    expected = grand.pool.counts(grand.pool.listed())
    accepted = expected.pop("accepted")
    assert grand.summary.reasons == expected
    assert grand.summary.counts == {"accepted": accepted, "rejected": expected.total()}
    with Catalog(grand.crawler.settings.catalog_file) as catalog:
        figures = catalog.statistics()
    assert figures.counts == grand.summary.counts
    assert figures.reasons == expected


def test_the_few_that_no_listing_finds_are_judged_by_a_list(grand: Grand, tmp_path: Path) -> None:
    listed = grand.pool.expected(grand.pool.listed())
    unlisted = {k: v for k, v in grand.pool.expected().items() if k not in listed}
    assert set(unlisted.values()) == {"not_found", "no_config", "accepted", "unknown_base"} & set(
        unlisted.values()
    )
    crawler = Crawler(grand.crawler.stand, tmp_path)
    assert crawler.verdicts(ids=(*unlisted, "nobody/nothing")) == {
        **unlisted,
        "nobody/nothing": "not_found",
    }


def test_no_stranger_costs_more_than_three_requests_to_the_hub(grand: Grand) -> None:
    to_hub = Counter("/".join(one.parts[:2]) for one in grand.log if one.kind == "resolve")
    assert max(to_hub.values()) == 3
    assert grand.asked["listing"] == LISTINGS
    assert {"info", "tree", "other"}.isdisjoint(grand.asked)
    assert grand.summary.requests == grand.asked["listing"] + grand.asked["resolve"]
    assert grand.summary.storage_requests == grand.asked["storage"]
    for name, one in grand.first.items():
        if one.status == "accepted":
            assert to_hub[name] == 2 + (CARD in grand.repository(name).newest), name
        elif one.reason in (*NEVER_ASKED, "no_config"):
            assert to_hub[name] == 0, name
        else:
            assert 1 <= to_hub[name] <= 2, name


def test_a_second_crawl_asks_for_the_listing_alone(grand: Grand) -> None:
    assert grand.second_asked == {"listing": LISTINGS}
    assert grand.second_summary.requests == LISTINGS
    assert grand.second_summary.storage_requests == 0
    assert grand.second == grand.first


def test_commits_that_were_seen_are_not_asked_for_again(grand: Grand) -> None:
    assert grand.pinned_log == []
    assert grand.pinned == {
        name: one for name, one in grand.first.items() if one.reason not in NEVER_ASKED
    }


def test_what_is_kept_is_what_was_uploaded(grand: Grand, tmp_path: Path) -> None:
    for number, (name, one) in enumerate(grand.accepted().items()):
        original = grand.write(name, tmp_path / str(number))
        assert one.path is not None
        kept = Path(one.path)
        assert kept.name == one.sha256 == sha_of(grand.repository(name))
        assert (kept / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
        assert damage(kept) is None
        assert_same_update(kept, dense_sum({original: 1.0}), 0)


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "rank-stabilised scale",
        "ranks and alphas by pattern",
        "a rank by a whole path",
        "targets as unsloth writes them",
        "one layer as a number",
        "alpha missing",
        "base a file of the system",
    ],
)
def test_peft_loads_the_same_from_the_cache(
    grand: Grand, tmp_path: Path, pico_folder: Path, kind: str
) -> None:
    name = grand.pool.of_kind(kind).id
    original = added_by_peft(pico_folder, grand.write(name, tmp_path / "own"))
    kept = added_by_peft(pico_folder, Path(grand.first[name].path or ""))
    assert kept.keys() == original.keys() != set()
    for module, difference in original.items():
        assert numpy.array_equal(kept[module], difference), module


def test_only_what_vetting_allowed_is_in_the_cache(grand: Grand) -> None:
    assert grand.kept == {str(one.sha256) for one in grand.accepted().values()}
    usual = {CONFIG, WEIGHTS, "source/adapter_config.original.json"}
    for one in grand.accepted().values():
        folder = Path(one.path or "")
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        names = {path.relative_to(folder).as_posix() for path in files}
        assert names - {f"source/{CARD}"} == usual
        assert not any(path.is_symlink() for path in files)


def test_nothing_is_asked_for_but_three_names(grand: Grand) -> None:
    names = {"/".join(one.parts[4:]) for one in grand.log if one.kind == "resolve"}
    assert names == {CONFIG, WEIGHTS, CARD}
    assert {one.parameter("filename") for one in grand.log if one.kind == "storage"} == {WEIGHTS}
    assert {one.method for one in grand.log} == {"GET"}


def test_what_the_author_wrote_stays_beside_as_text(grand: Grand) -> None:
    for name, one in grand.accepted().items():
        source, newest = Path(one.path or "") / "source", grand.repository(name).newest
        config = (source / "adapter_config.original.json").read_bytes()
        assert config == newest[CONFIG].content
        card = newest[CARD].content[: 64 * 1024] if CARD in newest else b""
        if card:
            expected = card.decode("utf-8", errors="replace")
            assert (source / CARD).read_bytes().decode() == expected, name
        else:
            assert not (source / CARD).exists()


def test_what_the_hub_says_is_in_the_documents(grand: Grand) -> None:
    for name, one in grand.first.items():
        repository = grand.repository(name)
        assert (one.source, one.origin, one.pool) == ("hub", name, BASE_MODEL)
        assert one.revision == repository.sha
        assert (one.author, one.likes) == (repository.author, repository.likes)
        assert one.downloads == repository.downloads
        assert one.created_at == repository.created_at
        assert one.last_modified == repository.last_modified
        assert one.tags == list(repository.tags)
        licences = [t.removeprefix("license:") for t in repository.tags if t.startswith("license:")]
        assert one.license == (", ".join(licences) or None)
        if one.status == "accepted":
            assert one.size_bytes == size_of(repository)


ATTACKS = [
    ("pickle as weights", "a pickle", "no_safetensors"),
    ("pickle beside weights", "a pickle beside the weights", "accepted"),
    ("tensor that overwrites the base", "a weight of the base", "foreign_key"),
    ("missing tensors: A", "A missing", "pair_incomplete"),
    ("missing tensors: B", "B missing", "pair_incomplete"),
    ("empty file", "an empty file", "truncated"),
    ("file without tensors", "no tensors", "no_tensors"),
    ("NaN weights", "not a number", "non_finite"),
    ("slow regex in target_modules", "slow pattern in target_modules", "accepted"),
    ("slow regex in exclude_modules", "slow pattern in exclude_modules", "accepted"),
    ("slow regex in layers_pattern", "slow pattern in layers_pattern", "accepted"),
    ("slow regex in rank_pattern", "slow pattern in rank_pattern", "pattern_regex"),
    ("slow regex in alpha_pattern", "slow pattern in alpha_pattern", "pattern_regex"),
    ("slow regex in modules_to_save", "a slow pattern saved", "modules_to_save"),
    ("r of 2 to the 28", "rank of 2 to the 28", "bad_config"),
    ("layer replication 200 times", "layers repeated", "layer_replication"),
    ("init pissa", "initialised by pissa", "init_alters_base"),
    ("init olora", "initialised by olora", "init_alters_base"),
    ("init corda", "initialised by corda", "init_alters_base"),
    ("init eva leaves the base alone", "initialised by eva", "accepted"),
    ("init orthogonal leaves the base alone", "initialised as orthogonal", "accepted"),
    ("module to import", "a module to import", "megatron"),
    ("megatron_core alone", "another megatron_core", "accepted"),
    ("auto_mapping to os", "auto_mapping to the os module", "accepted"),
    ("base model a system file", "base a file of the system", "accepted"),
    ("runtime_config", "runtime_config", "accepted"),
    ("cache file to load", "a cache file to load", "corda"),
    ("covariance file to load", "a covariance file to load", "corda"),
    ("token row beyond the vocabulary", "token rows trained", "token_rows"),
    ("unknown keys", "fields of another trainer", "accepted"),
    ("XLORA", "method xlora", "not_lora"),
    ("prompt tuning", "method prompt_tuning", "not_lora"),
    ("unknown method", "method unknown", "not_lora"),
    ("r as text", "rank as text", "bad_config"),
    ("r a fraction", "rank a fraction", "bad_config"),
    ("r negative", "rank negative", "bad_config"),
    ("r unlike the shapes", "rank unlike the tensors'", "rank_mismatch"),
    ("eight-bit floats", "eight-bit floats", "dtype"),
    ("names that lead elsewhere", "names that lead elsewhere", "accepted"),
    ("only names that lead elsewhere", "its only files lead elsewhere", "no_config"),
    ("header nested 5000 deep", "a header nested deeply", "bad_header"),
    ("header a list", "a header that is a list", "bad_header"),
    ("negative shape", "a negative shape", "bad_header"),
    ("shape of 10 to the 30", "a shape of 10 to the 30", "bad_header"),
    ("offsets of 10 to the 30", "offsets of 10 to the 30", "bad_header"),
    ("tensors beyond number", "tensors beyond number", "header_too_large"),
    ("header beyond the cap", "a header of two megabytes", "header_too_large"),
    ("header that is not UTF-8", "a header that is not UTF-8", "bad_header"),
    ("gaps between tensors", "a gap between tensors", "bad_header"),
    ("tensors that overlap", "tensors that overlap", "bad_header"),
    ("bytes behind the last tensor", "bytes behind the last", "bad_header"),
    ("tags that are a number", "tags that are a number", "accepted"),
]


@pytest.mark.parametrize(("attack", "kind", "verdict"), ATTACKS, ids=[row[0] for row in ATTACKS])
def test_no_known_attack_gets_through(grand: Grand, attack: str, kind: str, verdict: str) -> None:
    stranger = grand.pool.of_kind(kind)
    assert stranger.expected == verdict
    one = grand.first[stranger.id]
    assert (one.reason or one.status) == verdict, attack
    if verdict == "accepted":
        kept = json.loads((Path(one.path or "") / CONFIG).read_text())
        assert set(kept["target_modules"]) <= set(base_shapes())
        assert kept["base_model_name_or_path"] == BASE_MODEL
        assert set(kept) == {
            *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r"),
            *("lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"),
            *("bias", "lora_dropout", "use_dora", "fan_in_fan_out", "init_lora_weights"),
            "modules_to_save",
        }


# --- what goes wrong once -------------------------------------------------------------------


def line_of(name: str, file: str = "", origin: str = "") -> str:
    """A pattern for the requests for one file of a repository."""
    if origin == "storage":
        return rf"GET /lab/{name}/[0-9a-f]{{64}}"
    return rf"GET /lab/{name}/resolve/.*{file}"


ONCE: dict[str, tuple[dict[str, Any], list[Fault]]] = {
    "config-503": ({}, [Fault(line_of("config-503", CONFIG), faults.server_error(503), times=1)]),
    "weights-502": (
        {},
        [Fault(line_of("weights-502", WEIGHTS), faults.server_error(502), times=1)],
    ),
    "storage-500": (
        {},
        [Fault(line_of("storage-500", origin="storage"), faults.server_error(500), times=1)],
    ),
    "limit": ({}, [Fault(line_of("limit", CONFIG), faults.too_many_requests(0), times=1)]),
    "retry-after": (
        {},
        [Fault(line_of("retry-after", CARD), faults.too_many_requests(0, "Retry-After"), times=1)],
    ),
    "config-cut": ({}, [Fault(line_of("config-cut", CONFIG), faults.truncated(20), times=2)]),
    "card-cut": ({}, [Fault(line_of("card-cut", CARD), faults.truncated(5), times=1)]),
    "start-cut": (
        LARGE,
        [Fault(line_of("start-cut", origin="storage"), faults.truncated(999), times=2)],
    ),
    "rest-cut": (
        LARGE,
        [Fault(line_of("rest-cut", origin="storage"), faults.truncated(70_000), skip=1, times=5)],
    ),
    "range-ignored": (
        LARGE,
        [Fault(line_of("range-ignored", origin="storage"), faults.range_ignored())],
    ),
    "hung": ({}, [Fault(line_of("hung", WEIGHTS), faults.hanging(), times=1)]),
    "storage-hung": (
        LARGE,
        [Fault(line_of("storage-hung", origin="storage"), faults.hanging(), skip=1, times=1)],
    ),
    "longer": ({}, [Fault(line_of("longer", origin="storage"), faults.longer(100))]),
}


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crawler]:
    """A crawl of repositories with which something goes wrong at first."""
    repositories = [
        adapter(f"lab/{name}", seed, **made) for seed, (name, (made, _)) in enumerate(ONCE.items())
    ]
    happening = [fault for _, some in ONCE.values() for fault in some]
    with Hub(repositories, faults=happening) as stand:
        crawler = Crawler(stand, tmp_path_factory.mktemp("mended"), workers=16)
        crawler.patience = Patience(answer_s=2)
        crawler.crawl()
        yield crawler


@pytest.mark.parametrize("name", ONCE)
def test_what_goes_wrong_for_a_while_is_asked_for_again(mended: Crawler, name: str) -> None:
    (fault,) = ONCE[name][1]
    assert fault.hits == fault.times or (fault.times is None and fault.hits > 0)
    (row,) = (row for row in mended.rows() if row["id"] == f"lab/{name}")
    assert (row["status"], row["reason"]) == ("accepted", None)
    repository = mended.stand.shelves.repositories[f"lab/{name}"]
    assert row["sha256"] == sha_of(repository)
    kept = Path(row["path"])
    assert (kept / WEIGHTS).read_bytes() == repository.newest[WEIGHTS].content
    assert (kept / "source" / CARD).read_bytes() == repository.newest[CARD].content


def test_a_body_that_breaks_off_goes_on_where_it_was(mended: Crawler) -> None:
    ranges = [one.range for one in mended.log if one.kind == "storage" and "rest-cut" in one.target]
    starts = [int((one or "").removeprefix("bytes=").partition("-")[0]) for one in ranges]
    size = size_of(mended.stand.shelves.repositories["lab/rest-cut"])
    assert starts == [0, *range(FIRST_BYTES, size, 70_000)][: len(starts)]
    assert len(starts) == 7


def test_a_wait_for_the_rate_limit_is_told(mended: Crawler) -> None:
    assert "the Hub's rate limit is reached: waiting 1 s" in mended.heard.messages


def test_only_what_was_allowed_is_left_after_all_that(mended: Crawler) -> None:
    assert mended.kept() == {row["sha256"] for row in mended.rows()}


def test_a_crawl_waits_for_the_next_window_of_a_quota(stand_in: StandIn) -> None:
    repositories = [adapter(f"lab/{n}", n) for n in range(4)]
    quotas = {"resolvers": Quota(8, 1), "api": Quota(500, 300)}
    crawler = stand_in(*repositories, quotas=quotas)
    assert set(crawler.verdicts().values()) == {"accepted"}
    answers = Counter(one.status for one in crawler.log if one.kind == "resolve")
    assert answers[429] > 0
    assert answers.total() - answers[429] == 12
    assert crawler.summary.requests == LISTINGS + answers.total()
    assert any("waiting" in told for told in crawler.heard.messages)


# --- what is not what was announced ---------------------------------------------------------


def other_size(answer: Answer) -> Answer:
    return faults.lying_size(999)(answer)


def no_sizes(answer: Answer) -> Answer:
    headers = {k: v for k, v in answer.headers.items() if k != "X-Linked-Size"}
    return replace(answer, headers=headers)


WRONG: dict[str, tuple[str, dict[str, Any], list[Fault]]] = {
    "tampered": (
        "checksum",
        {},
        [Fault(line_of("tampered", origin="storage"), faults.tampered())],
    ),
    "tampered-later": (
        "checksum",
        LARGE,
        [Fault(line_of("tampered-later", origin="storage"), faults.tampered(), skip=1)],
    ),
    "shorter": (
        "unreachable",
        {},
        [Fault(line_of("shorter", origin="storage"), faults.shorter(9))],
    ),
    "shorter-whole": (
        "checksum",
        {},
        [
            Fault(line_of("shorter-whole", origin="storage"), faults.range_ignored()),
            Fault(line_of("shorter-whole", origin="storage"), faults.shorter(9)),
        ],
    ),
    "longer-whole": (
        "checksum",
        {},
        [
            Fault(line_of("longer-whole", origin="storage"), faults.range_ignored()),
            Fault(line_of("longer-whole", origin="storage"), faults.longer(9)),
        ],
    ),
    "lying": ("checksum", {}, [Fault(line_of("lying", WEIGHTS), other_size)]),
    "lying-larger": (
        "checksum",
        {},
        [Fault(line_of("lying-larger", WEIGHTS), faults.lying_size(1 << 62))],
    ),
    "cut-for-ever": (
        "unreachable",
        LARGE,
        [Fault(line_of("cut-for-ever", origin="storage"), faults.truncated(0), skip=1)],
    ),
    "config-cut-for-ever": (
        "unreachable",
        {},
        [Fault(line_of("config-cut-for-ever", CONFIG), faults.truncated(0))],
    ),
    "storage-refuses": (
        "unreachable",
        {},
        [Fault(line_of("storage-refuses", origin="storage"), lambda _: faults.error(403, "no"))],
    ),
    "refused": (
        "unreachable",
        {},
        [Fault(line_of("refused", CONFIG), lambda _: faults.error(418, "teapot"))],
    ),
}


class Wrong:
    """A crawl of bodies that are not what was announced, and one after they were put right."""

    def __init__(self, stand: Hub, home: Path) -> None:
        self.crawler = Crawler(stand, home, workers=16)
        self.first = self.crawler.crawl()
        self.summary, self.kept = self.crawler.summary, self.crawler.kept()
        stand.faults.clear()
        self.second = self.crawler.crawl()
        self.files_asked = self.crawler.files_asked()


IMPATIENT = Patience(answer_s=2, rate_over_s=0.5, longest_wait_s=5)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, CARD])
def test_a_server_that_drips_bytes_is_left_for_another_crawl(stand_in: StandIn, file: str) -> None:
    crawler = stand_in(adapter("lab/drips", 1, **LARGE), adapter("lab/well", 2))
    crawler.patience = IMPATIENT
    pattern = {WEIGHTS: line_of("drips", origin="storage")}.get(file, line_of("drips", file))
    crawler.stand.faults.append(Fault(pattern, faults.dripping(10, 0.05)))
    dripping = crawler.crawl()["lab/drips"]
    if file == CARD:  # which is a hint, not a condition
        assert dripping.status == "accepted"
    else:
        assert (dripping.status, dripping.reason) == ("failed", "unreachable")
        assert "bytes a second, fewer than 1024" in (dripping.detail or "")
    assert len(crawler.kept()) == crawler.summary.counts["accepted"]
    crawler.stand.faults.clear()
    assert crawler.verdicts() == {"lab/drips": "accepted", "lab/well": "accepted"}


def test_a_body_that_comes_slowly_but_steadily_is_taken(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    crawler.patience = IMPATIENT
    crawler.stand.faults.append(
        Fault(line_of("one", origin="storage"), faults.dripping(1000, 0.05))
    )
    assert crawler.verdicts() == {"lab/one": "accepted"}


@pytest.mark.parametrize("header", ["RateLimit", "Retry-After"])
def test_nobody_waits_for_an_hour(stand_in: StandIn, header: Any) -> None:
    crawler = stand_in(adapter("lab/one", 1), adapter("lab/two", 2))
    crawler.patience = IMPATIENT
    late = Fault(line_of("one", WEIGHTS), faults.too_many_requests(3600, header))
    crawler.stand.faults.append(late)
    one = crawler.crawl()["lab/one"]
    assert (one.status, one.reason, late.hits) == ("failed", "unreachable", 1)
    assert f"{crawler.stand.url} asks to wait 3600 s" in (one.detail or "")
    crawler.stand.faults[:] = [Fault("/api/models", faults.too_many_requests(3600, header))]
    with pytest.raises(RecycleError, match=r"cannot be listed: .* asks to wait 3600 s") as caught:
        crawler.crawl()
    assert caught.value.hint == "try again then"
    crawler.stand.faults.clear()
    assert set(crawler.verdicts().values()) == {"accepted"}


def test_many_short_waits_are_a_long_one(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    crawler.patience = IMPATIENT
    late = Fault(line_of("one", CONFIG), faults.too_many_requests(2))
    crawler.stand.faults.append(late)
    assert crawler.verdicts() == {"lab/one": "unreachable"}
    assert late.hits == 3


def test_the_client_asks_nothing_on_its_own(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    crawler = stand_in(adapter("lab/one"))
    with online(crawler.stand.url):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
        Client(crawler.stand.url).adapters_of([BASE_MODEL])
    assert crawler.stand.counts == {"listing": 1}
    assert crawler.stand.requests[0].headers["user-agent"].startswith("recycle-cli/")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrong]:
    repositories = [
        adapter(f"lab/{name}", seed, **made)
        for seed, (name, (_, made, _)) in enumerate(WRONG.items())
    ]
    happening = [fault for _, _, some in WRONG.values() for fault in some]
    good = adapter("lab/good", 50)
    with Hub([*repositories, good], faults=happening) as stand:
        yield Wrong(stand, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_what_was_announced_fails(wrong: Wrong, name: str) -> None:
    one = wrong.first[f"lab/{name}"]
    assert (one.status, one.reason, one.path) == ("failed", WRONG[name][0], None)
    assert one.detail


def test_nothing_of_what_failed_stays(wrong: Wrong) -> None:
    assert wrong.kept == {str(wrong.first["lab/good"].sha256)}
    assert wrong.summary.counts == {"accepted": 1, "failed": len(WRONG)}
    assert wrong.summary.reasons == Counter(code for code, _, _ in WRONG.values())


def test_what_failed_is_tried_again_and_nothing_else(wrong: Wrong) -> None:
    assert {one.status for one in wrong.second.values()} == {"accepted"}
    assert set(wrong.files_asked) == {f"lab/{name}" for name in WRONG}


# --- how much is kept -----------------------------------------------------------------------


def test_what_fits_is_kept_and_more_room_takes_the_rest(stand_in: StandIn) -> None:
    repositories = [adapter(f"lab/{n}", n) for n in range(5)]
    size = size_of(repositories[0])
    crawler = stand_in(*repositories)
    verdicts = crawler.verdicts(max_cache_bytes=3 * size + 1, workers=1)
    assert list(verdicts.values()) == ["accepted"] * 3 + ["no_room"] * 2
    assert crawler.kept() == {sha_of(one) for one in repositories[:3]}
    assert crawler.summary.counts == {"accepted": 3, "failed": 2}
    assert set(crawler.verdicts(max_cache_bytes=10 * size).values()) == {"accepted"}
    assert set(crawler.files_asked()) == {"lab/3", "lab/4"}
    assert set(crawler.verdicts(max_cache_bytes=1).values()) == {"accepted"}


def test_what_is_refused_takes_no_room(stand_in: StandIn) -> None:
    refused = [adapter(f"lab/{n}", n, config={"lora_alpha": 0}) for n in range(4)]
    good = adapter("lab/9", 9)
    crawler = stand_in(*refused, good)
    verdicts = crawler.verdicts(max_cache_bytes=size_of(good), workers=1)
    assert verdicts == {**{f"lab/{n}": "no_effect" for n in range(4)}, "lab/9": "accepted"}


def test_what_is_there_already_takes_no_room(stand_in: StandIn) -> None:
    good = adapter("lab/one")
    crawler = stand_in(good)
    crawler.crawl()
    good.commit(changed(good, card=b"Another card."))
    assert crawler.verdicts(max_cache_bytes=size_of(good)) == {"lab/one": "accepted"}


def test_what_another_crawl_is_fetching_takes_room(stand_in: StandIn) -> None:
    good = adapter("lab/one")
    crawler = stand_in(good)
    crawler.settings.adapters_folder.mkdir(parents=True)
    with unfinished_folder(crawler.settings.adapters_folder) as folder:
        (folder / WEIGHTS).write_bytes(bytes(10))
        assert crawler.verdicts(max_cache_bytes=size_of(good) + 9) == {"lab/one": "no_room"}
        assert crawler.verdicts(max_cache_bytes=size_of(good) + 10) == {"lab/one": "accepted"}


def test_what_a_killed_crawl_left_goes_at_once(stand_in: StandIn) -> None:
    good = adapter("lab/one")
    crawler = stand_in(good)
    left = crawler.settings.adapters_folder / ".unfinished-left"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(bytes(10))
    assert crawler.verdicts(max_cache_bytes=size_of(good)) == {"lab/one": "accepted"}
    assert crawler.kept() == {sha_of(good)}


# --- tokens ---------------------------------------------------------------------------------

GATED = {"key": ["lab/gated", "lab/owned"], "other": []}


def gated_pool() -> list[Repository]:
    return [
        adapter("lab/gated", 1, gated="auto"),
        adapter("lab/owned", 2, gated="manual", **LARGE),
        adapter("lab/open", 3),
    ]


def test_the_token_goes_to_the_hub_alone(stand_in: StandIn) -> None:
    crawler = stand_in(*gated_pool(), tokens=GATED)
    assert set(crawler.verdicts("key").values()) == {"accepted"}
    sent = {(one.origin, one.authorization) for one in crawler.log}
    assert sent == {("hub", "Bearer key"), ("storage", None)}


def test_without_a_token_none_is_sent(stand_in: StandIn) -> None:
    crawler = stand_in(*gated_pool(), tokens=GATED)
    crawler.crawl()
    assert {one.authorization for one in crawler.log} == {None}


def test_a_gate_opens_to_the_right_token_alone(stand_in: StandIn) -> None:
    crawler = stand_in(*gated_pool(), tokens=GATED)
    closed = {"lab/gated": "gated", "lab/owned": "gated", "lab/open": "accepted"}
    assert crawler.verdicts() == closed
    assert set(crawler.files_asked()) == {"lab/open"}
    assert crawler.verdicts("other") == closed
    assert set(crawler.files_asked()) == {"lab/gated", "lab/owned"}
    assert set(crawler.verdicts("key").values()) == {"accepted"}
    assert set(crawler.files_asked()) == {"lab/gated", "lab/owned"}
    assert set(crawler.verdicts().values()) == {"accepted"}
    assert crawler.files_asked() == {}


def test_a_token_that_the_hub_does_not_know_ends_the_crawl(stand_in: StandIn) -> None:
    crawler = stand_in(*gated_pool(), tokens=GATED)
    with pytest.raises(RecycleError, match="cannot be listed") as caught:
        crawler.crawl("stolen")
    assert "HF_TOKEN" in caught.value.hint


def test_what_was_not_found_is_asked_for_again(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    ids = ("lab/one", "lab/late", "lab/one@nowhere")
    # Two lines of a list may name one repository; the latest has the last word here.
    assert crawler.verdicts(ids=ids[:2]) == {"lab/one": "accepted", "lab/late": "not_found"}
    assert crawler.verdicts(ids=ids[2:]) == {"lab/one": "not_found"}
    crawler.stand.add(adapter("lab/late", 1))
    assert crawler.verdicts(ids=ids[:2]) == {"lab/one": "accepted", "lab/late": "accepted"}
    assert crawler.asked["info"] == 2
    assert set(crawler.files_asked()) == {"lab/late"}


def test_a_listing_that_leads_elsewhere_is_refused(stand_in: StandIn) -> None:
    here = stand_in(adapter("lab/one"), tokens={"key": []})
    there = stand_in(adapter("lab/two"), tokens={"key": []})
    link = f'<{there.stand.url}/api/models?cursor=x>; rel="next"'
    here.stand.faults.append(Fault("/api/models", lambda a: a.with_headers(Link=link)))
    with pytest.raises(RecycleError, match="goes on at") as caught:
        here.crawl("key")
    assert "HF_ENDPOINT" in caught.value.hint
    assert there.stand.requests == []


def leading_to(url: str) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(307, {"Location": url})


def test_a_redirect_to_another_origin_gets_no_token(stand_in: StandIn) -> None:
    here = stand_in(adapter("lab/one"), adapter("lab/two", 1), tokens={"key": []})
    there = stand_in(tokens={"key": []})
    for name in ("one", "two"):
        file = {"one": CONFIG, "two": WEIGHTS}[name]
        url = f"{there.stand.url}/lab/{name}/resolve/main/{file}"
        here.stand.faults.append(Fault(line_of(name, file), leading_to(url)))
    assert set(here.verdicts("key").values()) <= {"unreachable", "not_found"}
    assert len(there.stand.requests) >= 2
    assert {one.authorization for one in there.stand.requests} == {None}
    here.stand.faults[:] = [Fault("/api/models", leading_to(f"{there.stand.url}/api/models"))]
    there.stand.reset_log()
    with pytest.raises(InputError, match="lists no adapter"):
        here.crawl("key")
    assert {one.authorization for one in there.stand.requests} == {None}


def test_a_listing_that_goes_round_in_a_circle_ends(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    link = f'<{crawler.stand.url}/api/models?filter=peft&expand=sha>; rel="next"'
    crawler.stand.faults.append(Fault("/api/models", lambda a: a.with_headers(Link=link), times=9))
    with pytest.raises(RecycleError, match="circle"):
        crawler.crawl()


# --- new commits ----------------------------------------------------------------------------


def test_a_new_commit_is_crawled_and_takes_the_place_of_the_old_one(stand_in: StandIn) -> None:
    one, two = adapter("lab/one", 1), adapter("lab/two", 2)
    crawler = stand_in(one, two)
    before = crawler.crawl()
    newer = adapter("lab/newer", 7).newest[WEIGHTS].content
    one.commit(changed(one, weights=newer))
    after = crawler.crawl()
    assert set(crawler.files_asked()) == {"lab/one"}
    assert after["lab/two"] == before["lab/two"]
    assert after["lab/one"].status == "accepted"
    assert after["lab/one"].sha256 == hashlib.sha256(newer).hexdigest()
    assert {(r["id"], r["revision"]): r["reason"] or r["status"] for r in crawler.rows()} == {
        ("lab/one", before["lab/one"].revision): "superseded",
        ("lab/one", one.sha): "accepted",
        ("lab/two", two.sha): "accepted",
    }
    assert crawler.crawl() == after
    assert crawler.asked == {"listing": LISTINGS}


def test_weights_that_are_there_are_not_fetched_for_a_new_configuration(
    stand_in: StandIn,
) -> None:
    one = adapter("lab/one", **LARGE)
    crawler = stand_in(one)
    before = crawler.crawl()["lab/one"]
    config = json.loads(one.newest[CONFIG].content)
    config["lora_alpha"] *= 2
    one.commit(changed(one, config=json.dumps(config).encode()))
    after = crawler.crawl()["lab/one"]
    ranges = [request.range for request in crawler.log if request.kind == "storage"]
    assert ranges == [f"bytes=0-{FIRST_BYTES - 1}"]
    assert (after.status, after.sha256) == ("accepted", before.sha256)
    assert after.path != before.path, "what was selected before is still what it was"
    assert json.loads((Path(before.path or "") / CONFIG).read_text())["lora_alpha"] == before.alpha
    assert after.norm == pytest.approx(2 * (before.norm or 0))
    kept = json.loads((Path(after.path or "") / CONFIG).read_text())
    assert kept["lora_alpha"] == config["lora_alpha"]


def test_a_new_commit_that_may_not_be_read_leaves_the_old_one_in_the_pool(
    stand_in: StandIn,
) -> None:
    one = adapter("lab/one")
    crawler = stand_in(one)
    before = crawler.crawl()["lab/one"]
    one.commit(changed(one, card=b"Mine alone."))
    one.gated = "manual"
    assert crawler.verdicts() == {"lab/one": "gated"}
    with Catalog(crawler.settings.catalog_file) as catalog:
        assert catalog.get(f"lab/one@{before.revision}").status == "accepted"
        assert catalog.get("lab/one").revision == before.revision
    one.gated = False
    assert crawler.verdicts() == {"lab/one": "accepted"}
    assert {row["reason"] for row in crawler.rows()} == {None, "superseded"}


# --- what is looked at, and what is let in --------------------------------------------------


def test_a_limit_takes_the_most_downloaded(stand_in: StandIn) -> None:
    repositories = [adapter(f"lab/{n}", n, downloads=(7 * n) % 10) for n in range(10)]
    crawler = stand_in(*repositories, page_size=2)
    names = sorted(repositories, key=lambda one: -one.downloads)
    assert set(crawler.verdicts(limit=3)) == {one.id for one in names[:3]}
    assert crawler.asked["listing"] == LISTINGS + 1
    assert set(crawler.files_asked()) == {one.id for one in names[:3]}


def test_one_owner_alone(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"), adapter("shop/two", 1))
    assert crawler.verdicts(author="shop") == {"shop/two": "accepted"}
    with pytest.raises(InputError, match="lists no adapter"):
        crawler.crawl(author="nobody")


def test_a_listing_has_many_pages(stand_in: StandIn) -> None:
    repositories = [adapter(f"lab/{n}", n) for n in range(7)]
    crawler = stand_in(*repositories, page_size=3)
    assert len(crawler.crawl()) == 7
    assert crawler.asked["listing"] == LISTINGS + 2


def test_licences_and_ranks_are_refused_before_weights_move(stand_in: StandIn) -> None:
    crawler = stand_in(
        adapter("lab/mit", 1),
        adapter("lab/wtfpl", 2, license="wtfpl"),
        adapter("lab/none", 3, license=None),
        adapter("lab/high", 4, **LARGE),
    )
    assert crawler.verdicts(licenses=frozenset({"MIT"}), max_rank=8) == {
        "lab/mit": "accepted",
        "lab/wtfpl": "license_refused",
        "lab/none": "license_refused",
        "lab/high": "rank_too_large",
    }
    assert crawler.files_asked() == {"lab/mit": 4, "lab/wtfpl": 1, "lab/none": 1, "lab/high": 3}


def test_a_file_that_is_too_large_is_refused_by_its_announced_size(stand_in: StandIn) -> None:
    large = adapter("lab/large", **LARGE)
    crawler = stand_in(large)
    size = size_of(large)
    assert crawler.verdicts(max_bytes=size - 1) == {"lab/large": "too_large"}
    assert [r.range for r in crawler.log if r.kind == "storage"] == [f"bytes=0-{FIRST_BYTES - 1}"]
    assert crawler.kept() == set()
    assert crawler.verdicts(max_bytes=size) == {"lab/large": "accepted"}


def test_the_norm_must_lie_between_the_limits(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    norm = crawler.crawl()["lab/one"].norm
    assert norm is not None
    assert crawler.verdicts(min_norm=norm) == {"lab/one": "norm_out_of_range"}
    assert crawler.verdicts(min_norm=0.0, max_norm=norm) == {"lab/one": "accepted"}


def test_another_name_of_the_base_is_listed_and_let_in(stand_in: StandIn) -> None:
    other = adapter("lab/other", 1)
    draft = json.loads(other.newest[CONFIG].content) | {"base_model_name_or_path": "Mirror/Pico"}
    other.commit(changed(other, config=json.dumps(draft).encode()))
    other.tags = ("base_model:adapter:mirror/pico",)
    crawler = stand_in(adapter("lab/one"), other)
    assert crawler.verdicts() == {"lab/one": "accepted"}
    names = frozenset({"mirror/pico"})
    assert crawler.verdicts(also_bases=names) == {"lab/one": "accepted", "lab/other": "accepted"}
    assert crawler.asked["listing"] == LISTINGS + 1
    assert crawler.crawl()["lab/one"].base_model == BASE_MODEL


def test_a_folder_as_base_needs_a_name_on_the_hub(stand_in: StandIn, tmp_path: Path) -> None:
    crawler = stand_in(adapter("lab/one"), request={"base_model": str(tmp_path)})
    with pytest.raises(InputError, match="is a folder") as caught:
        crawler.crawl()
    assert "--also-base" in caught.value.hint
    one = crawler.crawl(also_bases=frozenset({BASE_MODEL}))["lab/one"]
    assert (one.status, one.base_model) == ("accepted", str(tmp_path))


def test_what_is_offline_asks_nobody(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    settings = replace(crawler.settings, offline=True)
    with pytest.raises(InputError, match="--offline"):
        crawl(crawler.request, settings, base_shapes())
    assert crawler.stand.requests == []


# --- dry runs -------------------------------------------------------------------------------


def test_a_dry_run_stops_at_the_header_and_says_what_the_rest_takes(stand_in: StandIn) -> None:
    good = [adapter(f"lab/{n}", n, **LARGE) for n in range(3)]
    dora = adapter("lab/dora", 5, config={"use_dora": True})
    quotas = {"resolvers": Quota(8, 60)}
    crawler = stand_in(*good, dora, quotas=quotas)
    verdicts = crawler.verdicts(dry_run=True)
    assert verdicts == {**{one.id: "accepted" for one in good}, "lab/dora": "dora"}
    assert crawler.asked == {"listing": LISTINGS, "resolve": 7, "storage": 3}
    ranges = {one.range for one in crawler.log if one.kind == "storage"}
    assert ranges == {f"bytes=0-{FIRST_BYTES - 1}"}
    assert not crawler.settings.home.exists()
    summary = crawler.summary
    assert summary.bytes_to_come == sum(map(size_of, good))
    assert summary.requests_to_come == 9
    # Nine requests at eight in 60 s: the ninth waits for a second window.
    assert summary.rate_limited_s == 60
    assert summary.bytes < 3 * FIRST_BYTES + 40_000


def test_a_dry_run_says_what_the_limit_of_listings_takes(stand_in: StandIn) -> None:
    ids = tuple(f"lab/{n}" for n in range(3))
    crawler = stand_in(*(adapter(name, n) for n, name in enumerate(ids)))
    crawler.crawl(dry_run=True, ids=ids)
    assert crawler.summary.rate_limited_s == 0
    crawler.stand.set_quotas({"api": Quota(2, 1)})
    crawler.crawl(dry_run=True, ids=ids)
    # Three commits are asked for, at two in a second: the third waits for a second window.
    assert (crawler.summary.rate_limited_s or 0) >= 1


def test_a_dry_run_counts_nothing_that_is_kept_already(stand_in: StandIn) -> None:
    one, two = adapter("lab/one", 1), adapter("lab/two", 2)
    crawler = stand_in(one)
    crawler.crawl()
    crawler.stand.add(two)
    before = crawler.rows()
    assert set(crawler.verdicts(dry_run=True).values()) == {"accepted"}
    assert crawler.summary.requests_to_come == 3
    assert crawler.summary.bytes_to_come == size_of(two)
    assert crawler.summary.rate_limited_s == 0
    assert crawler.rows() == before
    assert crawler.kept() == {sha_of(one)}


# --- files that hang ------------------------------------------------------------------------


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_nothing_waits_for_a_file_that_hangs(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    names = [f"lab/{n:02d}" for n in range(50)]
    crawler = stand_in(*(adapter(name, n) for n, name in enumerate(names)))
    others = threading.Event()
    crawler.stand.faults.append(Fault(line_of("00", file), faults.held(others)))

    def advance(note: str = "") -> None:
        crawler.heard.advanced.append(note)
        if len(crawler.heard.advanced) == 49:
            others.set()

    monkeypatch.setattr(crawler.heard, "advance", advance)
    assert list(crawler.verdicts()) == names
    assert crawler.heard.advanced[-1] == "lab/00: accepted"
    assert len(crawler.heard.advanced) == 50


@pytest.mark.parametrize("workers", [2, 8])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_of_several_with_the_same_weights_the_earliest_is_kept_even_if_it_hangs(
    stand_in: StandIn, workers: int, file: str
) -> None:
    first = adapter("lab/first", created_at="2025-01-01")
    again = [uploaded_again(f"lab/again{n}", first, f"2025-01-0{n}") for n in (2, 3)]
    crawler, undisturbed = (stand_in(first, *again) for _ in range(2))
    crawler.stand.faults.append(Fault(line_of("first", file), faults.slow(0.5)))
    for dry_run in (True, False):
        told = crawler.crawl(workers=workers, dry_run=dry_run)
        assert list(told) == [first.id, *(one.id for one in again)]
        assert [one.reason for one in told.values()] == [None, "duplicate", "duplicate"]
        assert crawler.summary.counts == {"accepted": 1, "rejected": 2}
    undisturbed.crawl(workers=1)
    assert comparable(crawler) == comparable(undisturbed)
    assert crawler.crawl() == told


def comparable(crawler: Crawler) -> list[dict[str, Any]]:
    """The index but for where and when it was made."""
    apart = {"key", "path", "recorded"}
    return [{k: v for k, v in row.items() if k not in apart} for row in crawler.rows()]


def test_an_earlier_one_that_is_refused_keeps_no_weights_from_a_later_one(
    stand_in: StandIn,
) -> None:
    first = adapter("lab/first", license="wtfpl", created_at="2025-01-01")
    again = uploaded_again("lab/again", first, "2025-01-02")
    again.tags = tuple("license:mit" if "license" in tag else tag for tag in first.tags)
    crawler = stand_in(first, again)
    assert crawler.verdicts() == {"lab/first": "accepted", "lab/again": "duplicate"}
    crawler.stand.faults.append(Fault(line_of("first", CONFIG), faults.slow(0.5)))
    assert crawler.verdicts(licenses=frozenset({"mit"})) == {
        "lab/first": "license_refused",
        "lab/again": "accepted",
    }


def test_when_a_new_commit_of_the_first_is_refused_its_duplicate_takes_its_place(
    stand_in: StandIn,
) -> None:
    first = adapter("lab/first", created_at="2025-01-01")
    again = uploaded_again("lab/again", first, "2025-01-02")
    crawler = stand_in(first, again)
    assert crawler.verdicts() == {"lab/first": "accepted", "lab/again": "duplicate"}
    config = json.loads(first.newest[CONFIG].content) | {"use_dora": True}
    first.commit(changed(first, config=json.dumps(config).encode()))
    crawler.stand.faults.append(Fault(line_of("first", CONFIG), faults.slow(0.5)))
    assert crawler.verdicts() == {"lab/first": "dora", "lab/again": "accepted"}
    assert crawler.verdicts() == {"lab/first": "dora", "lab/again": "accepted"}
    assert crawler.asked == {"listing": LISTINGS}


def test_of_a_list_the_one_that_stands_first_is_kept_whatever_was_before(
    stand_in: StandIn,
) -> None:
    first = adapter("lab/first", created_at="2025-01-01")
    again = uploaded_again("lab/again", first, "2025-01-02")
    crawler = stand_in(first, again)
    crawler.crawl()
    turned = crawler.verdicts(ids=(again.id, first.id))
    assert turned == {"lab/again": "accepted", "lab/first": "duplicate"}


# --- what is held already -------------------------------------------------------------------


def test_what_other_limits_refuse_is_not_fetched_again_when_it_is_let_in(
    stand_in: StandIn,
) -> None:
    one = adapter("lab/one", **LARGE)
    crawler = stand_in(one)
    accepted, kept = crawler.crawl()["lab/one"], crawler.kept()
    for limits in ({"licenses": frozenset({"gpl"})}, {"max_rank": 2}, {"max_norm": 1.5}):
        refused = crawler.crawl(**limits)["lab/one"]
        assert refused.status == "rejected"
        assert (refused.path, refused.norm) == (accepted.path, accepted.norm)
        assert crawler.kept() == kept
        with Catalog(crawler.settings.catalog_file) as catalog:
            assert catalog.query(AdapterQuery()) == []
            assert catalog.details_of(refused).modules
    assert crawler.crawl()["lab/one"] == accepted
    ranges = [request.range for request in crawler.log if request.kind == "storage"]
    assert ranges == [f"bytes=0-{FIRST_BYTES - 1}"]


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (Fault(line_of("one", WEIGHTS), faults.lying_size(1)), "checksum"),
        (Fault(line_of("one", CONFIG), faults.too_many_requests(3600)), "unreachable"),
        (None, "gated"),
    ],
)
def test_what_cannot_be_looked_at_again_stays_in_the_pool(
    stand_in: StandIn, fault: Fault | None, verdict: str
) -> None:
    one = adapter("lab/one")
    crawler = stand_in(one)
    before, kept, rows = crawler.crawl()["lab/one"], crawler.kept(), crawler.rows()
    assert before.status == "accepted"
    if fault is None:
        one.gated = "manual"
    else:
        crawler.stand.faults.append(fault)
    assert crawler.verdicts(max_rank=64) == {"lab/one": verdict}
    assert (crawler.kept(), crawler.rows()) == (kept, rows)
    one.gated, crawler.stand.faults = False, []
    assert crawler.verdicts(max_rank=64) == {"lab/one": "accepted"}


# --- one bad repository ---------------------------------------------------------------------


def answering(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    """Changes the content of a JSON answer."""
    return lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode())


NO_REPOSITORIES = [
    None,
    7,
    "lab/text",
    [],
    {},
    {"id": "lab/no-sha"},
    {"id": "lab/short-sha", "sha": "abc"},
    {"id": "lab/upper-sha", "sha": "A" * 40},
    {"id": "lab/odd-sha", "sha": "../../../etc/passwd"},
    {"id": 5, "sha": "a" * 40},
    {"id": "../../etc/passwd", "sha": "a" * 40},
    {"id": "lab/../../x", "sha": "a" * 40},
    {"id": "lab/a--b", "sha": "a" * 40},
    {"id": "https://evil.example/x", "sha": "a" * 40},
    {"id": "", "sha": "a" * 40},
]
ODD_FACTS = {
    "tags": [1, None, "license:mit", "base_model:adapter:" + BASE_MODEL, "x\x1b[2J"],
    "downloads": "many",
    "likes": -3,
    "author": {"name": 1},
    "createdAt": 5,
    "gated": None,
    "disabled": "yes",
}


def test_entries_of_a_listing_that_are_none_are_passed_over(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"), adapter("lab/odd", 1))

    def change(page: list[dict[str, Any]]) -> list[Any]:
        odd = [one | ODD_FACTS if one["id"] == "lab/odd" else one for one in page]
        for one in odd:
            one["siblings"] = [
                *(
                    {"rfilename": name}
                    for name in ("../../x", "/etc/passwd", "a/../b", "adapter_model.bin")
                ),
                *(None, 5, {"rfilename": None}, {}),
                *one["siblings"],
            ]
        return [*NO_REPOSITORIES, *odd, *NO_REPOSITORIES]

    crawler.stand.faults.append(Fault("/api/models", answering(change)))
    documents = crawler.crawl()
    assert {name: one.status for name, one in documents.items()} == {
        "lab/one": "accepted",
        "lab/odd": "accepted",
    }
    assert crawler.summary.passed_over == LISTINGS * 2 * len(NO_REPOSITORIES)
    odd = documents["lab/odd"]
    assert (odd.downloads, odd.likes, odd.author, odd.created_at) == (None, None, None, None)
    assert odd.tags[-1] == "x\ufffd[2J"
    asked = {"/".join(one.parts[4:]) for one in crawler.log if one.kind == "resolve"}
    assert asked == {CONFIG, WEIGHTS, CARD}


@pytest.mark.parametrize("page", [{}, "no", 5, None])
def test_a_listing_that_is_no_list_ends_the_crawl(stand_in: StandIn, page: Any) -> None:
    crawler = stand_in(adapter("lab/one"))
    crawler.stand.faults.append(Fault("/api/models", answering(lambda _: page)))
    with pytest.raises(RecycleError, match="no list"):
        crawler.crawl()


def test_a_listing_that_is_no_json_ends_the_crawl(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    for body in (b"<html>", b"\xff\xfe", b"[" * 100_000, b""):
        crawler.stand.faults[:] = [
            Fault("/api/models", lambda answer, body=body: replace(answer, body=body))
        ]
        with pytest.raises(RecycleError, match="not JSON"):
            crawler.crawl()


def test_files_that_the_listing_names_and_the_hub_lacks(stand_in: StandIn) -> None:
    names = ["config", "weights", "card"]
    crawler = stand_in(*(adapter(f"lab/{name}", seed) for seed, name in enumerate(names)))
    for name, file in zip(names, (CONFIG, WEIGHTS, CARD), strict=True):
        missing = faults.error(404, "Entry not found", "EntryNotFound")
        crawler.stand.faults.append(Fault(line_of(name, file), lambda _, missing=missing: missing))
    assert crawler.verdicts() == {
        "lab/config": "no_config",
        "lab/weights": "no_safetensors",
        "lab/card": "accepted",
    }


def test_ids_of_a_list_that_are_none(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    bad = ("lab/a--b", "lab/.hidden", "lab/" + "x" * 100, "lab/one@../../main", "lab/one@v9")
    verdicts = crawler.verdicts(ids=("lab/one", *bad))
    assert verdicts.pop("lab/one") in ("accepted", "not_found")
    assert set(verdicts.values()) == {"not_found"}


def test_a_list_may_name_branches_and_commits(stand_in: StandIn) -> None:
    one = adapter("lab/one")
    old = one.sha
    one.commit(changed(one, card=b"new"))
    one.branches["v1"] = old
    crawler = stand_in(one)
    assert crawler.crawl(ids=("lab/one@v1",))["lab/one"].revision == old
    assert crawler.crawl(ids=(f"lab/one@{old}",))["lab/one"].revision == old
    assert crawler.log == []
    assert crawler.crawl(ids=("lab/one",))["lab/one"].revision == one.sha


def test_a_renamed_repository_is_looked_at_once(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/old"))
    crawler.stand.rename("lab/old", "lab/new")
    assert crawler.verdicts(ids=("lab/old", "lab/new")) == {"lab/new": "accepted"}
    assert crawler.summary.counts == {"accepted": 1}


def test_a_hub_that_tells_of_another_commit_is_not_believed(stand_in: StandIn) -> None:
    one = adapter("lab/one")
    crawler = stand_in(one)
    before = one.sha
    one.commit(changed(one, card=b"later"))
    crawler.stand.faults.append(
        Fault(f"/revision/{before}", answering(lambda facts: facts | {"sha": one.sha}))
    )
    assert crawler.verdicts(ids=(f"lab/one@{before}",)) == {"lab/one": "unreachable"}
    assert crawler.kept() == set()


def test_a_crawl_that_is_left_early_leaves_nothing_behind(stand_in: StandIn) -> None:
    crawler = stand_in(*(adapter(f"lab/{n}", n, **LARGE) for n in range(12)))
    with online(crawler.stand.url):
        stream = crawl(
            crawler.request, crawler.settings, base_shapes(), None, Client(crawler.stand.url)
        )
        first = next(stream)
        stream.close()  # type: ignore[attr-defined]
        recorded = {row["sha256"] for row in crawler.rows()}
        assert getattr(first, "sha256", None) in recorded
        wait_for(lambda: crawler.kept() == recorded)
    assert set(crawler.verdicts().values()) == {"accepted"}


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    import time

    ending = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ending
        time.sleep(0.02)


# --- fetched again --------------------------------------------------------------------------


def lose(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def damage_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:100])


@pytest.mark.parametrize("harm", [lose, damage_weights])
def test_what_the_cache_lost_comes_again_from_the_hub(stand_in: StandIn, harm: Any) -> None:
    crawler = stand_in(adapter("lab/one", **LARGE))
    document = crawler.crawl()["lab/one"]
    kept = Path(document.path or "")
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    harm(kept)
    with online(crawler.stand.url):
        fetch_again(document, crawler.settings)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert crawler.kept() == {document.sha256}


def test_a_repository_that_has_gone_is_not_fetched_again(stand_in: StandIn) -> None:
    crawler = stand_in(adapter("lab/one"))
    document = crawler.crawl()["lab/one"]
    lose(Path(document.path or ""))
    crawler.stand.remove("lab/one")
    with online(crawler.stand.url), pytest.raises(RecycleError, match="cannot be fetched again"):
        fetch_again(document, crawler.settings)
    with pytest.raises(RecycleError, match="no network"):
        fetch_again(document, replace(crawler.settings, offline=True))
    assert crawler.kept() == set()


def in_a_folder(folder: Path, repository: Repository) -> Path:
    folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS, CARD):
        (folder / name).write_bytes(repository.newest[name].content)
    return folder


def crawl_folder(folder: Path, settings: Settings) -> AdapterDocument:
    document, summary = crawl(CrawlRequest(folder, BASE_MODEL), settings, base_shapes())
    assert isinstance(document, AdapterDocument)
    assert isinstance(summary, CrawlDocument)
    assert document.status == "accepted"
    return document


def test_what_the_cache_lost_comes_again_from_a_folder(tmp_path: Path) -> None:
    folder = in_a_folder(tmp_path / "pool/one", adapter("lab/one"))
    settings = Settings(tmp_path / "home", offline=True)
    document = crawl_folder(tmp_path / "pool", settings)
    kept = Path(document.path or "")
    lose(kept)
    fetch_again(document, settings)
    assert damage(kept) is None
    assert_same_update(kept, dense_sum({folder: 1.0}), 0)


def test_an_origin_that_changed_says_so(tmp_path: Path) -> None:
    folder = in_a_folder(tmp_path / "pool/one", adapter("lab/one"))
    settings = Settings(tmp_path / "home", offline=True)
    document = crawl_folder(tmp_path / "pool", settings)
    lose(Path(document.path or ""))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 1e9}))
    with pytest.raises(RecycleError, match="another update"):
        fetch_again(document, settings)
    (folder / WEIGHTS).write_bytes(adapter("lab/two", 5).newest[WEIGHTS].content)
    with pytest.raises(RecycleError, match="holds other weights now"):
        fetch_again(document, settings)
    lose(folder)
    with pytest.raises(RecycleError, match="cannot be fetched again"):
        fetch_again(document, settings)
    assert list(settings.adapters_folder.iterdir()) == []
