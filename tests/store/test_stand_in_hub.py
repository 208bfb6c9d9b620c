"""The stand-in Hub, asked by the real client in a process of its own, and the strangers on it."""

import hashlib
import http.client
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save
from support.hub import Fault, Hub, Quota, Repository, faults
from support.strangers import HUB_CODES, Pool, base_shapes, make_pool

from recycle_cli.engine.base_model import linear_shapes
from recycle_cli.settings import Settings
from recycle_cli.store.evidence import FolderEvidence
from recycle_cli.store.folder import FoundFolder
from recycle_cli.store.vetting import CHECKS, VettingLimits, VettingRules, describe, vet

WEIGHTS = save({"a.lora_A.weight": torch.ones(4, 8)}, {"format": "pt"})
LONG_HEADER = save({"a": torch.ones(2, 3)}, {"note": "x" * 120_000})
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": WEIGHTS}
TAGS = ("base_model:adapter:lab/Base", "license:mit")
RESOLVE, STORAGE = r"/lab/one/resolve/", r"GET /lab/one/[0-9a-f]{64}"

PREAMBLE = """
import json
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
api = HfApi()

def say(value):
    print(json.dumps(value))

def error_of(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return type(error).__name__
"""
Ask = Callable[..., list[Any]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Two adapters that match a listing, one of another base, one of another library."""
    repositories = [
        Repository("lab/one", FILES, TAGS, downloads=5),
        Repository("lab/two", FILES, TAGS, downloads=9),
        Repository("shop/three", FILES, ("base_model:adapter:lab/Base-2",)),
        Repository("shop/four", FILES, TAGS, library_name="diffusers"),
    ]
    with Hub(repositories, tokens={"key": ["lab/gated", "lab/secret"], "other": []}) as hub:
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Runs code with the real client, which keeps a cache for the test; what the code said."""

    def run(code: str, token: str | None = None) -> list[Any]:
        environment = {**hub.environment, "HF_HOME": str(tmp_path / "hf")}
        if token is not None:
            environment["HF_TOKEN"] = token
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def asked(hub: Hub) -> list[tuple[str, str, int]]:
    """Origin, method and status of every request so far, which are then forgotten."""
    seen = [(str(request.origin), request.method, request.status) for request in hub.requests]
    hub.reset_log()
    return seen


# --- a Hub in good health -------------------------------------------------------------------


def test_listings_filter_sort_and_come_in_pages(hub: Hub, ask: Ask) -> None:
    hub.shelves.page_size = 1
    both, by_downloads, limited, author, search, everything = ask(
        """
        both = ["base_model:adapter:lab/Base", "peft"]
        say([m.id for m in api.list_models(filter=both)])
        say([m.id for m in api.list_models(filter=both, sort="downloads")])
        say([m.id for m in api.list_models(filter=both, limit=1)])
        say([m.id for m in api.list_models(author="shop")])
        say([m.id for m in api.list_models(search="THREE")])
        say([m.id for m in api.list_models()])
        """
    )
    assert both == ["lab/one", "lab/two"]
    assert by_downloads == ["lab/two", "lab/one"]
    assert limited == ["lab/one"]
    assert author == ["shop/three", "shop/four"]
    assert search == ["shop/three"]
    assert everything == ["lab/one", "lab/two", "shop/three", "shop/four"]
    assert hub.counts == {"listing": 2 + 2 + 1 + 2 + 1 + 4}


def test_a_listing_tells_what_was_asked_for_and_no_more(hub: Hub, ask: Ask) -> None:
    asked_for, told, beyond = ask(
        """
        fields = "author sha lastModified createdAt gated private disabled downloads likes"
        names = [*fields.split(), "library_name", "tags", "siblings"]
        one = next(iter(api.list_models(search="lab/one", expand=names)))
        say([one.author, one.sha, one.gated, one.downloads, one.library_name, one.tags])
        say([[s.rfilename, s.size, s.lfs] for s in one.siblings])
        one = next(iter(api.list_models(search="lab/one", expand=["sha"])))
        say([one.author, one.tags, one.siblings])
        """
    )
    sha = hub.shelves.repositories["lab/one"].sha
    assert asked_for == ["lab", sha, False, 5, "peft", list(TAGS)]
    assert told == [[name, None, None] for name in FILES]
    assert beyond == [None, None, None]


def test_private_repositories_are_listed_for_whom_they_open(hub: Hub, ask: Ask) -> None:
    hub.add(Repository("lab/secret", FILES, TAGS, private=True))
    code = 'say([m.id for m in api.list_models(author="lab")])'
    assert ask(code) == [["lab/one", "lab/two"]]
    assert ask(code, token="other") == [["lab/one", "lab/two"]]
    assert ask(code, token="key") == [["lab/one", "lab/two", "lab/secret"]]


def test_revisions_sizes_and_trees(hub: Hub, ask: Ask) -> None:
    one = hub.shelves.repositories["lab/one"]
    first = one.sha
    second = one.commit({**FILES, "runs/1/log.txt": b"done\n"})
    one.branches["refs/pr/1"] = first
    infos, sizes, tree, top, bytes_then = ask(
        f"""
        names = [None, "main", "refs/pr/1", "{first}"]
        say([api.model_info("lab/one", revision=name).sha for name in names])
        blobs = api.model_info("lab/one", files_metadata=True).siblings
        say([[s.rfilename, s.size, s.lfs and s.lfs.sha256] for s in blobs])
        tree = api.list_repo_tree("lab/one", recursive=True)
        say([[t.path, t.size, t.lfs and t.lfs.sha256] for t in tree if hasattr(t, "size")])
        say([t.path for t in api.list_repo_tree("lab/one")])
        path = hf_hub_download("lab/one", "adapter_config.json", revision="refs/pr/1")
        say("{first}" in path)
        """
    )
    assert infos == [second, second, first, first]
    digest = one.newest["adapter_model.safetensors"].sha256
    expected = [
        ["adapter_config.json", 8, None],
        ["adapter_model.safetensors", len(WEIGHTS), digest],
        ["runs/1/log.txt", 5, None],
    ]
    assert sizes == tree == expected
    assert top == ["runs", "adapter_config.json", "adapter_model.safetensors"]
    assert bytes_then is True


def test_a_header_is_read_by_ranges(hub: Hub, ask: Ask) -> None:
    hub.add(Repository("lab/long", {"adapter_model.safetensors": LONG_HEADER}))
    shapes = ask(
        """
        for name in ("lab/one", "lab/long"):
            header = api.parse_safetensors_file_metadata(name, "adapter_model.safetensors")
            say([[key, tensor.shape] for key, tensor in header.tensors.items()])
        """
    )
    assert shapes == [[["a.lora_A.weight", [4, 8]]], [["a", [2, 3]]]]
    from_storage = [request for request in hub.requests if request.origin == "storage"]
    assert [request.status for request in from_storage] == [206, 206, 206]
    first, again, rest = (request.range for request in from_storage)
    assert first == again == "bytes=0-100000"
    assert rest is not None
    assert rest.startswith("bytes=8-12")


def test_a_second_download_asks_for_nothing(hub: Hub, ask: Ask) -> None:
    sha = hub.shelves.repositories["lab/one"].sha
    code = f"""
        say(open(hf_hub_download("lab/one", "adapter_config.json", revision="{sha}")).read())
        """
    assert ask(code) == ['{"r": 4}']
    assert asked(hub) == [("hub", "HEAD", 200), ("hub", "GET", 200)]
    weights = code.replace("adapter_config.json", "adapter_model.safetensors")
    weights = weights.replace(").read()", ', "rb").read().hex()')
    assert ask(weights) == [WEIGHTS.hex()]
    assert asked(hub) == [("hub", "HEAD", 302), ("storage", "GET", 200)]
    assert ask(code + weights.strip()) == ['{"r": 4}', WEIGHTS.hex()]
    assert asked(hub) == []


def test_a_snapshot_is_whole_and_kept(hub: Hub, ask: Ask) -> None:
    sha = hub.shelves.repositories["lab/one"].sha
    code = f"""
        import os
        say(sorted(os.listdir(snapshot_download("lab/one", revision="{sha}"))))
        api.verify_repo_checksums("lab/one", revision="{sha}")
        """
    assert ask(code) == [sorted(FILES)]
    assert hub.counts == {"tree": 2, "resolve": 3, "storage": 1}
    hub.reset_log()
    assert ask(code.replace("api.verify", "#")) == [sorted(FILES)]
    assert asked(hub) == []


def test_a_renamed_repository_is_found_under_its_old_name(hub: Hub, ask: Ask) -> None:
    hub.rename("lab/one", "lab/uno")
    name, config, shape = ask(
        """
        say(api.model_info("lab/one").id)
        say(open(hf_hub_download("lab/one", "adapter_config.json")).read())
        header = api.parse_safetensors_file_metadata("lab/one", "adapter_model.safetensors")
        say(header.tensors["a.lora_A.weight"].shape)
        """
    )
    assert (name, config, shape) == ("lab/uno", '{"r": 4}', [4, 8])


def test_a_folder_becomes_a_repository(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights" / "model.safetensors").write_bytes(WEIGHTS)
    repository = Repository.from_folder("lab/base", tmp_path)
    assert list(repository.newest) == ["config.json", "weights/model.safetensors"]
    assert repository.newest["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


# --- who may see what -----------------------------------------------------------------------


REFUSALS = """
    for name in ("lab/gated", "lab/secret", "lab/missing", "lab/closed"):
        say([
            error_of(api.model_info, name),
            error_of(hf_hub_download, name, "adapter_config.json"),
            error_of(api.parse_safetensors_file_metadata, name, "adapter_model.safetensors"),
        ])
    """


@pytest.fixture
def guarded(hub: Hub) -> Hub:
    """With a gated, a private and a disabled repository."""
    hub.add(Repository("lab/gated", FILES, gated="manual"))
    hub.add(Repository("lab/secret", FILES, private=True))
    hub.add(Repository("lab/closed", FILES, disabled=True))
    return hub


@pytest.mark.parametrize(
    ("token", "statuses"), [(None, {200, 401, 403}), ("other", {200, 403, 404})]
)
def test_closed_doors_have_names(
    guarded: Hub, ask: Ask, token: str | None, statuses: set[int]
) -> None:
    gated, secret, missing, closed = ask(REFUSALS, token)
    assert gated == [None, "GatedRepoError", "GatedRepoError"]
    assert secret == missing == ["RepositoryNotFoundError"] * 3
    assert closed[0] == closed[2] == "DisabledRepoError"
    assert {request.status for request in guarded.requests} == statuses


def test_a_token_opens_and_stays_with_the_hub(guarded: Hub, ask: Ask) -> None:
    gated, secret, *_ = ask(REFUSALS, "key")
    assert gated == secret == [None, None, None]
    hub_tokens = {request.token for request in guarded.requests if request.origin == "hub"}
    others = [r.authorization for r in guarded.requests if r.origin == "storage"]
    assert hub_tokens == {"key"}
    assert others == [None, None]


def test_what_is_not_there_has_names(hub: Hub, ask: Ask) -> None:
    names, invalid = ask(
        """
        say([
            error_of(hf_hub_download, "lab/one", "no.json"),
            error_of(hf_hub_download, "lab/one", "adapter_config.json", revision="v9"),
            error_of(api.model_info, "lab/one", revision="v9"),
        ])
        say(error_of(api.model_info, "lab/one", token="invalid"))
        """
    )
    assert names[0] == "RemoteEntryNotFoundError"
    assert names[1:] == ["RevisionNotFoundError"] * 2
    assert invalid == "HfHubHTTPError"


# --- what goes wrong ------------------------------------------------------------------------


def test_the_client_waits_as_it_is_told(hub: Hub, ask: Ask) -> None:
    hub.faults += [
        Fault("GET /api/models", faults.server_error(503), times=1),
        Fault("GET /api/models", faults.too_many_requests(0), times=1, skip=1),
        Fault(f"GET {RESOLVE}", faults.too_many_requests(0, "Retry-After"), times=1),
    ]
    listed, config = ask(
        """
        at_once = ThreadPoolExecutor()
        listed = at_once.submit(lambda: len(list(api.list_models())))
        path = at_once.submit(hf_hub_download, "lab/one", "adapter_config.json")
        say(listed.result())
        say(open(path.result()).read())
        """
    )
    assert (listed, config) == (4, '{"r": 4}')
    assert [r.status for r in hub.requests if r.kind == "listing"] == [503, 429, 200]
    assert [r.status for r in hub.requests if r.kind == "resolve"] == [200, 429, 200]


def test_calls_that_the_client_does_not_repeat(hub: Hub, ask: Ask) -> None:
    hub.faults += [
        Fault("GET /api/models/lab/one", faults.too_many_requests(60)),
        Fault(f"GET {RESOLVE}", faults.server_error(500)),
    ]
    errors = ask(
        """
        say(error_of(api.model_info, "lab/one"))
        say(error_of(api.parse_safetensors_file_metadata, "lab/one", "adapter_model.safetensors"))
        """
    )
    assert errors == ["HfHubHTTPError"] * 2
    assert len(hub.requests) == 2


# The client keeps what it has received in steps of this many bytes, and resumes from there.
CHUNK = 10 * 1024 * 1024


def test_a_truncated_body_is_resumed(hub: Hub, ask: Ask) -> None:
    content = bytes(range(256)) * (CHUNK // 256 + 1000)
    for name in ("large/ranged", "large/whole"):
        hub.add(Repository(name, {"adapter_model.safetensors": content}))
    hub.faults += [
        Fault("GET /large/ranged/[0-9a-f]{64}", faults.truncated(CHUNK + 99), times=1),
        Fault("GET /large/whole/[0-9a-f]{64}", faults.truncated(CHUNK + 99), times=1),
        Fault("GET /large/whole/[0-9a-f]{64}", faults.range_ignored()),
    ]
    digests = ask(
        """
        import hashlib
        def digest(name):
            path = hf_hub_download(name, "adapter_model.safetensors")
            return hashlib.sha256(open(path, "rb").read()).hexdigest()
        say(list(ThreadPoolExecutor().map(digest, ["large/ranged", "large/whole"])))
        """
    )
    assert digests == [[hashlib.sha256(content).hexdigest()] * 2]

    def answers(name: str) -> list[tuple[int, str | None]]:
        bodies = [r for r in hub.requests if r.origin == "storage" and f"/{name}/" in r.target]
        return [(request.status, request.range) for request in bodies]

    resumption = f"bytes={CHUNK}-"
    assert answers("large/ranged") == [(200, None), (206, resumption)]
    assert answers("large/whole") == [(200, None), (200, resumption)]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(STORAGE, faults.longer(10)),
        Fault(STORAGE, faults.shorter(10)),
        Fault(f"HEAD {RESOLVE}", faults.lying_size(10)),
    ],
    ids=["longer", "shorter", "announced otherwise"],
)
def test_a_body_of_another_size_is_refused(hub: Hub, ask: Ask, fault: Fault) -> None:
    hub.faults.append(fault)
    code = 'say(error_of(hf_hub_download, "lab/one", "adapter_model.safetensors"))'
    assert ask(code) == ["OSError"]


def test_a_tampered_body_of_the_same_size_is_not_noticed(hub: Hub, ask: Ask) -> None:
    hub.faults.append(Fault(STORAGE, faults.tampered()))
    code = 'say(open(hf_hub_download("lab/one", "adapter_model.safetensors"), "rb").read().hex())'
    (content,) = ask(code)
    assert len(content) == len(WEIGHTS.hex())
    assert content != WEIGHTS.hex()


def test_a_client_without_patience_leaves_a_hub_that_says_nothing(hub: Hub, ask: Ask) -> None:
    hub.faults += [
        Fault("GET /api/models/lab/one", faults.hanging()),
        Fault("GET /api/models/lab/two", faults.slow(0.3)),
    ]
    impatient, patient = ask(
        """
        say(error_of(api.model_info, "lab/one", timeout=0.5))
        say(error_of(api.model_info, "lab/two", timeout=5))
        """
    )
    assert (impatient, patient) == ("ReadTimeout", None)
    assert [request.status for request in hub.requests] == [0, 200]


# --- on the wire ----------------------------------------------------------------------------


class Wire:
    """One connection that is kept open."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)

    def send(self, method: str, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, target, headers=headers)
        answer = self.connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()


def test_quotas_are_counted_in_windows(hub: Hub) -> None:
    clock = [10.0]
    hub.set_quotas({"resolvers": Quota(limit=2, window_s=300)}, now=lambda: clock[0])
    wire, target = Wire(hub.url), "/lab/one/resolve/main/adapter_config.json"
    seen = [wire.send("GET", target) for _ in range(3)]
    assert [status for status, _, _ in seen] == [200, 200, 429]
    assert seen[0][1]["RateLimit"] == '"resolvers";r=1;t=300'
    assert seen[2][1]["RateLimit"] == '"resolvers";r=0;t=300'
    assert seen[2][1]["RateLimit-Policy"] == '"fixed window";"resolvers";q=2;w=300'
    assert wire.send("GET", "/api/models")[0] == 200
    clock[0] = 309.9
    assert wire.send("GET", target)[1]["RateLimit"] == '"resolvers";r=0;t=1'
    clock[0] = 310.0
    assert wire.send("GET", target)[0] == 200


def test_ranges_and_links_as_the_storage_serves_them(hub: Hub) -> None:
    status, headers, body = Wire(hub.url).send(
        "HEAD", "/lab/one/resolve/main/adapter_model.safetensors"
    )
    assert (status, headers["Content-Length"], body) == (302, "0", b"")
    assert headers["X-Linked-Size"] == str(len(WEIGHTS))
    link = urlsplit(headers["Location"])
    assert f"{link.scheme}://{link.netloc}" == hub.storage_url != hub.url
    target, wire = f"{link.path}?{link.query}", Wire(hub.storage_url)
    assert wire.send("GET", target)[2] == WEIGHTS
    assert wire.send("GET", target, Range="bytes=-4")[2] == WEIGHTS[-4:]
    status, headers, body = wire.send("GET", target, Range="bytes=2-5")
    assert (status, body) == (206, WEIGHTS[2:6])
    assert headers["Content-Range"] == f"bytes 2-5/{len(WEIGHTS)}"
    assert wire.send("GET", target, Range=f"bytes={len(WEIGHTS)}-")[0] == 416
    assert wire.send("GET", link.path)[0] == 403
    assert wire.send("GET", target, Authorization="Bearer key")[0] == 400


def test_faults_are_drawn_alike_whatever_the_order(hub: Hub) -> None:
    hub.shelves.renamed |= {f"old/{number}": "lab/one" for number in range(40)}
    targets = [f"/old/{number}/resolve/main/adapter_config.json" for number in range(40)]
    fault = faults.server_error(502)

    def hit(order: list[str]) -> set[str]:
        hub.faults[:] = [Fault("/old/", fault, probability=0.3, seed=7)]
        wire = Wire(hub.url)
        return {target for target in order if wire.send("GET", target)[0] == 502}

    once = hit(targets)
    assert 0 < len(once) < 40
    assert hit(targets[::-1]) == once


def test_a_hub_that_ends_waits_for_nobody() -> None:
    fault = Fault("GET /api/models", faults.hanging())
    with Hub([Repository("lab/one", FILES)], faults=[fault]) as hub:
        idle = Wire(hub.url)
        assert idle.send("GET", "/lab/one/resolve/main/adapter_config.json")[0] == 200
        waiting = threading.Thread(target=_expect_no_answer, args=[hub.url])
        waiting.start()
        while not hub.counts["listing"]:
            time.sleep(0.01)
        started = time.monotonic()
    assert time.monotonic() - started < 1.0
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises((http.client.HTTPException, OSError)):
        idle.send("GET", "/lab/one/resolve/main/adapter_config.json")


def _expect_no_answer(url: str) -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        Wire(url).send("GET", "/api/models")


# --- the strangers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(count=300, seed=1)


def contents(pool: Pool) -> dict[str, dict[str, bytes]]:
    return {
        repository.id: {path: file.content for path, file in repository.newest.items()}
        for repository in pool.repositories
    }


def test_the_same_seed_makes_the_same_strangers(pool: Pool) -> None:
    again, other = make_pool(count=300, seed=1), make_pool(count=300, seed=2)
    assert contents(again) == contents(pool)
    assert [r.sha for r in again.repositories] == [r.sha for r in pool.repositories]
    assert [s.kind for s in other.strangers] != [s.kind for s in pool.strangers]
    assert contents(other).values() != contents(pool).values()
    assert other.counts() == pool.counts()
    with pytest.raises(ValueError, match="kinds of strangers, not 10"):
        make_pool(count=10)


def test_every_reason_has_a_stranger(pool: Pool) -> None:
    codes = {code for check in CHECKS for code in check.codes}
    needs_limits = {"license_refused", "too_large", "rank_too_large"}
    needs_a_disk = {"link_outside", "superseded"}
    assert set(pool.counts()) == {"accepted", *HUB_CODES, *codes} - needs_limits - needs_a_disk
    assert len(pool.expected()) == len(pool.strangers) == 300
    assert pool.counts()["accepted"] > 100


def test_strangers_fit_the_pico_model(pico_folder: Path, tmp_path: Path) -> None:
    shapes = linear_shapes(str(pico_folder), Settings(tmp_path, offline=True))
    assert {**base_shapes(), "lm_head": shapes["lm_head"]} == shapes


def test_vetting_gives_each_stranger_what_is_expected(pool: Pool, tmp_path: Path) -> None:
    holders: dict[str, str] = {}
    rules = VettingRules(
        pool.base_model, base_shapes(), VettingLimits(), lambda sha256, _: holders.get(sha256)
    )
    seen: dict[str, str] = {}
    for stranger in pool.strangers:
        if stranger.expected in HUB_CODES:
            continue
        evidence = FolderEvidence(
            FoundFolder(stranger.id, write(stranger.repository, tmp_path), tmp_path)
        )
        document = describe(evidence, vet(evidence, rules), rules)
        seen[stranger.id] = document.reason or document.status
        if document.status == "accepted":
            holders[evidence.sha256] = stranger.id
    assert seen == {name: pool.expected()[name] for name in seen}
    assert len(seen) > 280


def write(repository: Repository, root: Path) -> Path:
    """The files at a repository's root, as a folder."""
    folder = root / repository.id
    folder.mkdir(parents=True)
    for path, file in repository.newest.items():
        if "/" not in path and "\\" not in path:
            (folder / path).write_bytes(file.content)
    return folder


def test_a_listing_finds_the_strangers_that_say_so(pool: Pool, hub: Hub, ask: Ask) -> None:
    for repository in pool.repositories:
        hub.add(repository)
    code = """
        for base in ("pico-lab/Pico-Llama", "unsloth/Pico-Llama-bnb-4bit"):
            tags = [f"base_model:adapter:{base}", "peft"]
            say([m.id for m in api.list_models(filter=tags, expand=["sha", "siblings"])])
        """
    original, copies = ask(code)
    assert original == [stranger.id for stranger in pool.listed(pool.base_model)]
    assert copies
    assert {*original, *copies} == {stranger.id for stranger in pool.listed()}
    unlisted = {s.kind for s in pool.strangers} - {s.kind for s in pool.listed()}
    assert unlisted == {
        "private",
        "a LoRA of a picture model",
        "no base and other shapes",
        "no base and other layers",
    }
    assert hub.counts["listing"] == 3 + 1
