"""What is asked of the Hub, and what is made of its answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub.utils import close_session
from hypothesis import given
from hypothesis import strategies as st
from support.crawling import CARD, CONFIG, WEIGHTS, adapter, online
from support.hub import Fault, Quota, faults
from support.hub import Hub as StandIn
from support.hub.messages import Answer
from support.strangers import BASE_MODEL

from recycle_cli.errors import RecycleError
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.store.hub import Hub
from recycle_cli.store.hub_errors import NO_SUCH_FILE, Unreachable
from recycle_cli.store.hub_repository import (
    FIELDS,
    SHA,
    HubRepository,
    parse_repository,
    pinned,
    unread,
)


@pytest.fixture
def stand() -> Iterator[StandIn]:
    repositories = [
        adapter("lab/one", 1, downloads=5),
        adapter("lab/two", 2, downloads=9),
        adapter("shop/three", 3, downloads=7, gated="manual"),
    ]
    tokens = {"key": ["shop/three"]}
    with StandIn(repositories, tokens=tokens) as stand, online(stand.url):
        yield stand


@pytest.fixture
def hub(stand: StandIn) -> Hub:
    return Hub(stand.url)


def changing(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode())


def test_a_listing_has_the_most_downloaded_first_and_each_once(stand: StandIn, hub: Hub) -> None:
    found = hub.adapters_of([BASE_MODEL, "nobody/nothing", BASE_MODEL])
    assert [one.id for one in found] == ["lab/two", "shop/three", "lab/one"]
    assert [one.gated for one in found] == [False, True, False]
    assert hub.traffic.requests == stand.counts["listing"] == 3
    assert [one.id for one in hub.adapters_of([BASE_MODEL], limit=1)] == ["lab/two"]
    assert [one.id for one in hub.adapters_of([BASE_MODEL], author="lab")] == ["lab/two", "lab/one"]


def test_what_a_listing_tells(stand: StandIn, hub: Hub) -> None:
    one = next(one for one in hub.adapters_of([BASE_MODEL]) if one.id == "lab/one")
    there = stand.shelves.repositories["lab/one"]
    assert (one.sha, one.revision, one.origin) == (there.sha, there.sha, "lab/one")
    assert set(one.files) == {CONFIG, WEIGHTS, CARD}
    assert (one.author, one.downloads, one.likes) == ("lab", 5, there.likes)
    assert (one.created_at, one.last_modified) == (there.created_at, there.last_modified)
    assert one.tagged("license:") == ("mit",)
    assert one.listed


def test_one_repository_at_its_branch_or_commit(stand: StandIn, hub: Hub) -> None:
    there = stand.shelves.repositories["lab/one"]
    there.branches["refs/pr/1"] = there.sha
    for revision in (None, "main", there.sha, "refs/pr/1"):
        assert hub.repository("lab/one", revision).sha == there.sha


@pytest.mark.parametrize(
    ("repo_id", "revision"),
    [
        ("lab/none", None),
        ("lab/one", "no-branch"),
        ("lab/a--b", None),
        ("a/b/c", None),
        ("../etc", None),
        ("lab/" + "x" * 200, None),
    ],
)
def test_what_is_not_there(hub: Hub, repo_id: str, revision: str | None) -> None:
    with pytest.raises(AdapterProblem) as caught:
        hub.repository(repo_id, revision)
    assert caught.value.code == "not_found"


def test_files_are_read_up_to_a_limit(stand: StandIn, hub: Hub) -> None:
    one = hub.repository("lab/one")
    whole = stand.shelves.repositories["lab/one"].newest[CONFIG].content
    assert hub.read(one, CONFIG, 10_000) == whole
    assert hub.read(one, CONFIG, 7) == whole[:7]
    with pytest.raises(AdapterProblem) as caught:
        hub.read(one, "absent.json", 7)
    assert caught.value.code == NO_SUCH_FILE
    with pytest.raises(AdapterProblem) as caught:
        hub.read(hub.repository("shop/three"), CONFIG, 7)
    assert caught.value.code == "gated"


def test_a_closed_repository(stand: StandIn, hub: Hub) -> None:
    one = hub.repository("lab/one")
    stand.shelves.repositories["lab/one"].disabled = True
    for ask in (lambda: hub.repository("lab/one"), lambda: hub.read(one, CONFIG, 7)):
        with pytest.raises(AdapterProblem) as caught:
            ask()
        assert caught.value.code == "disabled"


def test_bodies_come_as_they_are_and_in_as_many_requests_as_are_counted(
    stand: StandIn, hub: Hub
) -> None:
    one = hub.repository("lab/one")
    hub.read(one, CONFIG, 10_000)
    hub.read(one, WEIGHTS, 10)
    assert {request.headers["accept-encoding"] for request in stand.requests} == {"identity"}
    assert all("recycle-cli/" in request.headers["user-agent"] for request in stand.requests)
    assert (hub.traffic.requests, hub.traffic.storage_requests) == (3, 1)
    other = Hub(stand.url)
    other.repository("lab/one")
    assert (hub.traffic.requests, other.traffic.requests) == (3, 1)


def test_repetitions_are_counted_too(stand: StandIn, hub: Hub) -> None:
    stand.faults.append(Fault("/api/models", faults.server_error(), times=1))
    hub.repository("lab/one")
    assert hub.traffic.requests == 2


def test_the_hubs_quotas_are_remembered(stand: StandIn, hub: Hub) -> None:
    stand.set_quotas({"api": Quota(500, 300), "resolvers": Quota(3000, 60)})
    hub.read(hub.repository("lab/one"), WEIGHTS, 10)
    assert hub.quotas == {"api": (500, 300), "resolvers": (3000, 60)}


def test_an_answer_that_breaks_off_is_asked_for_three_times(stand: StandIn, hub: Hub) -> None:
    fault = Fault("/api/models", faults.truncated(20), times=2)
    stand.faults.append(fault)
    assert hub.repository("lab/one").id == "lab/one"
    fault.times = None
    with pytest.raises(Unreachable, match="broke off"):
        hub.repository("lab/one")
    assert fault.hits == 2 + 3


def test_an_answer_without_end_is_not_read_to_its_end(
    stand: StandIn, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recycle_cli.store.hub_requests.MAX_ANSWER_BYTES", 1000)
    stand.faults.append(Fault("/api/models", faults.longer(5000)))
    with pytest.raises(Unreachable, match="more than 1000 bytes"):
        hub.repository("lab/one")
    with pytest.raises(RecycleError, match="more than 1000 bytes"):
        hub.adapters_of([BASE_MODEL])


@pytest.mark.parametrize("answer", [None, [], {}, {"id": "lab/one"}, {"id": 1, "sha": "a" * 40}])
def test_an_answer_that_is_none(stand: StandIn, hub: Hub, answer: Any) -> None:
    stand.faults.append(Fault("/api/models", changing(lambda _: answer)))
    with pytest.raises(Unreachable, match="names no commit"):
        hub.repository("lab/one")


def test_the_token_is_sent_where_there_is_one(stand: StandIn) -> None:
    assert not Hub(stand.url).has_token
    with online(stand.url, "key"):
        hub = Hub(stand.url + "/")
        assert hub.has_token
        assert hub.endpoint == stand.url
        one = hub.repository("shop/three")
        with hub.open(hub.url_of(one, WEIGHTS)) as response:
            storage = str(response.url)
        with hub.open(storage):
            pass
    sent = [(request.origin, request.authorization) for request in stand.requests]
    assert sent == [
        ("hub", "Bearer key"),
        ("hub", "Bearer key"),
        ("storage", None),
        ("storage", None),
    ]


def test_a_session_that_another_thread_closes_is_the_hubs_trouble_and_no_crash(
    stand: StandIn, hub: Hub
) -> None:
    """The client has one session for all threads, and one that cannot connect closes it."""
    one = hub.repository("lab/one")

    def close() -> None:
        for _ in range(8):
            time.sleep(0.004)
            close_session()

    def read(_: int) -> str:
        try:
            hub.read(one, CONFIG, 10)
        except Unreachable as error:
            return error.code
        return "read"

    closing = threading.Thread(target=close)
    closing.start()
    with ThreadPoolExecutor(4) as pool:
        outcomes = set(pool.map(read, range(40)))
    closing.join()
    assert outcomes <= {"read", "unreachable"}
    assert read(0) == "read"


def test_a_commit_that_is_named_needs_no_question() -> None:
    sha = "0123456789" * 4
    assert pinned("lab/one", sha) == HubRepository("lab/one", sha, listed=False)
    for other in ("", "main", sha[:-1], sha.replace("1", "A"), f"{sha}\n"):
        assert pinned("lab/one", other) is None


def test_what_could_not_be_asked_for_says_why() -> None:
    problem = Unreachable("gone fishing")
    one = unread("lab/one\x1b", "main", problem)
    assert (one.id, one.revision, one.problem) == ("lab/one\ufffd", None, problem)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"id": st.just("lab/one") | JSON, "sha": st.just("a" * 40) | JSON},
    optional=dict.fromkeys((*FIELDS[2:], "author"), JSON),
)


@given(ENTRY | JSON)
def test_no_entry_of_a_listing_raises(entry: Any) -> None:
    one = parse_repository(entry)
    if one is None:
        return
    assert SHA.fullmatch(one.sha)
    assert one.id == "lab/one" or "/" not in one.id or one.id.count("/") == 1
    assert all("/" not in name for name in one.files)
    assert all(tag.isprintable() for tag in one.tags)
    assert one.downloads is None or one.downloads >= 0
