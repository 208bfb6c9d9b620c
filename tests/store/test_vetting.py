import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.small_pool import put_adapter
from support.strangers import HUB_CODES

from recycle_cli.lora.config import UNSUPPORTED, AdapterConfig, AdapterProblem, parse_config
from recycle_cli.lora.folder import read_config
from recycle_cli.lora.norm import fingerprint, module_norms, squared_norm, total_norm
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.records import AdapterDocument
from recycle_cli.store.evidence import FolderEvidence
from recycle_cli.store.folder import FoundFolder, find_adapters, with_versions
from recycle_cli.store.vetting import CHECKS, VettingLimits, VettingRules, describe, vet

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"
Shapes = dict[str, tuple[int, int]]
Tensors = dict[str, torch.Tensor]


def look_at(
    folder: Path,
    shapes: Shapes,
    limits: VettingLimits | None = None,
    base_model: str = "org/base",
    holder: str | None = None,
) -> AdapterDocument:
    rules = VettingRules(base_model, shapes, limits or VettingLimits(), lambda *_: holder)
    evidence = FolderEvidence(FoundFolder("one", folder, folder.parent))
    return describe(evidence, vet(evidence, rules), rules)


def test_a_good_adapter_is_accepted_and_described(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    document = look_at(write_adapter(tmp_path / "one"), base_shapes)
    assert (document.status, document.reason, document.detail) == ("accepted", None, None)
    assert document.rank is not None
    assert (document.rank.min, document.rank.max, document.alpha) == (2, 2, 4.0)
    assert document.target_modules == ["q_proj"]
    assert document.license == "mit"
    assert document.base_model == "org/base"
    assert document.path is None


CONFIGS: list[tuple[str, dict[str, Any] | str]] = [
    ("untargeted", {"target_modules": ["v_proj"]}),
    ("untargeted", {"exclude_modules": ["q_proj"]}),
    ("untargeted", {"layers_to_transform": [7]}),
    ("untargeted", {"layers_to_transform": 7, "layers_pattern": "layers"}),
    ("bad_config", {"layers_to_transform": ["0"]}),
    ("bad_config", {"alpha_pattern": {f"m{n}": 1 for n in range(5001)}}),
    ("bad_config", "not json"),
    ("bad_config", "[]"),
    ("bad_config", '{"a":' + "[" * 100_000),
    ("bad_config", {"r": 0}),
    ("bad_config", {"r": "8"}),
    ("bad_config", {"lora_alpha": 10**400}),
    ("bad_config", {"lora_alpha": float("nan")}),
    ("bad_config", {"r": None, "bias": None, "target_modules": 3}),
    ("config_too_large", " " * 1_000_001),
    ("not_lora", {"peft_type": "XLORA"}),
    ("not_causal_lm", {"task_type": "SEQ_CLS"}),
    ("pattern_regex", {"rank_pattern": {"(a+)+!": 2}}),
    ("wrong_base", {"base_model_name_or_path": "org/other"}),
    ("wrong_base", {"base_model_name_or_path": "base"}),
    ("rank_mismatch", {"r": 4}),
]


@pytest.mark.parametrize(("code", "config"), CONFIGS)
def test_bad_configurations(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, code: str, config: Any
) -> None:
    document = look_at(write_adapter(tmp_path / "one", config), base_shapes)
    assert (document.status, document.reason) == ("rejected", code)


def test_no_depth_of_nesting_raises(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    # Near the interpreter's limit a value can be parsed that repr() cannot show.
    limit = sys.getrecursionlimit()
    for depth in range(limit - 120, limit):
        config = '{"peft_type": "LORA", "r": 2, "bias": ' + "[" * depth + "]" * depth + "}"
        document = look_at(write_adapter(tmp_path / "one", config), base_shapes)
        assert document.reason in {"bias", "bad_config"}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_features_beyond_a_low_rank_update(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, name: str
) -> None:
    value = {"bias": "all", "init_lora_weights": "pissa"}.get(name, {"deep": [[[[1]]]]})
    document = look_at(write_adapter(tmp_path / "one", {name: value}), base_shapes)
    assert (document.status, document.reason) == ("rejected", UNSUPPORTED[name].code)


def scaled(tensors: Tensors, factor: float) -> Tensors:
    return {key: tensor * factor for key, tensor in tensors.items()}


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def renamed(tensors: Tensors) -> Tensors:
    return {key.replace("layers.1", "layers.9"): tensor for key, tensor in tensors.items()}


TENSORS: list[tuple[str, Callable[[Tensors], Tensors]]] = [
    ("dtype", lambda t: {key: value.double() for key, value in t.items()}),
    ("foreign_key", lambda t: t | {"base_model.model.model.embed.weight": torch.zeros(1)}),
    ("base_layer", lambda t: t | {"base_model.model.lm_head.base_layer.weight": torch.zeros(1)}),
    ("pair_incomplete", lambda t: without(t, B0)),
    ("shape_mismatch", lambda t: t | {A0: torch.zeros(3, 8)}),
    ("shape_mismatch", lambda t: t | {A0: torch.zeros(16)}),
    ("shape_mismatch", lambda t: t | {A0: torch.ones(2, 9)}),
    ("no_such_module", renamed),
    ("non_finite", lambda t: t | {A0: torch.full((2, 8), float("nan"))}),
    ("non_finite", lambda t: t | {B0: torch.full((8, 2), float("inf"))}),
    ("no_effect", lambda t: {k: v if "lora_A" in k else v * 0 for k, v in t.items()}),
    ("norm_out_of_range", lambda t: scaled(t, 100.0)),
    ("norm_out_of_range", lambda t: scaled(t, 1e37)),
]


@pytest.mark.parametrize(("code", "bend"), TENSORS)
def test_bad_tensors(
    tmp_path: Path,
    write_adapter: Any,
    make_tensors: Any,
    base_shapes: Shapes,
    code: str,
    bend: Callable[[Tensors], Tensors],
) -> None:
    folder = write_adapter(tmp_path / "one", tensors=bend(make_tensors({Q0: 2, Q1: 2})))
    document = look_at(folder, base_shapes)
    assert (document.status, document.reason) == ("rejected", code)


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("truncated", b""),
        ("header_too_large", struct.pack("<Q", 1 << 40) + b"{}"),
        ("bad_header", struct.pack("<Q", 2) + b"{}extra"),
        ("no_tensors", struct.pack("<Q", 2) + b"{}"),
    ],
)
def test_bad_weights_files(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, code: str, content: bytes
) -> None:
    document = look_at(write_adapter(tmp_path / "one", tensors=content), base_shapes)
    assert (document.status, document.reason) == ("rejected", code)


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        ("too_large", VettingLimits(max_weights_bytes=100)),
        ("rank_too_large", VettingLimits(max_rank=1)),
        ("license_refused", VettingLimits(licenses=frozenset({"apache-2.0"}))),
        ("norm_out_of_range", VettingLimits(max_norm=1.0)),
        ("norm_out_of_range", VettingLimits(min_norm=500.0)),
        (None, VettingLimits(max_rank=2, licenses=frozenset({"MIT"}), max_norm=500.0)),
    ],
)
def test_limits(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, code: str, limits: VettingLimits
) -> None:
    assert look_at(write_adapter(tmp_path / "one"), base_shapes, limits).reason == code


def test_an_unstated_licence_is_not_an_allowed_one(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    folder = write_adapter(tmp_path / "one", card=None)
    limits = VettingLimits(licenses=frozenset({"mit"}))
    assert look_at(folder, base_shapes, limits).reason == "license_refused"
    assert look_at(folder, base_shapes).status == "accepted"


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [({"MIT", "apache-2.0"}, None), ({"mit"}, "license_refused"), ({"gpl"}, "license_refused")],
)
def test_of_several_licences_all_have_to_be_allowed(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, allowed: set[str], reason: str | None
) -> None:
    card = "---\nlicense: [mit, apache-2.0]\n---\n"
    folder = write_adapter(tmp_path / "one", card=card)
    limits = VettingLimits(licenses=frozenset(allowed))
    assert look_at(folder, base_shapes, limits).reason == reason


def test_weights_that_are_no_file_are_called_so(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    weights = write_adapter(tmp_path / "one") / "adapter_model.safetensors"
    weights.unlink()
    for make in (weights.mkdir, lambda: weights.symlink_to("nowhere")):
        make()
        document = look_at(weights.parent, base_shapes)
        assert document.reason == "no_safetensors"
        assert document.detail == "adapter_model.safetensors is no regular file"
        weights.rmdir() if weights.is_dir() else weights.unlink()


def test_a_pickle_is_named_and_not_read(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    folder = write_adapter(tmp_path / "one")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    document = look_at(folder, base_shapes)
    assert document.reason == "no_safetensors"
    assert "adapter_model.bin" in (document.detail or "")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_lead_outside(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes, name: str
) -> None:
    folder = write_adapter(tmp_path / "root" / "one")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert look_at(folder, base_shapes).reason == "link_outside"


def test_the_same_weights_twice(tmp_path: Path, write_adapter: Any, base_shapes: Shapes) -> None:
    document = look_at(write_adapter(tmp_path / "one"), base_shapes, holder="org/first")
    assert (document.status, document.reason) == ("rejected", "duplicate")
    assert "org/first" in (document.detail or "")
    assert document.sha256


def test_what_cannot_be_read_has_failed(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    folder = write_adapter(tmp_path / "one")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    document = look_at(folder, base_shapes)
    assert (document.status, document.reason) == ("failed", "unreadable")


LOCAL = {"base_model_name_or_path": "/content/some/model"}
CARD = "---\nbase_model: {}\n---"


@pytest.mark.parametrize(
    ("config", "card", "modules", "reason"),
    [
        (LOCAL, None, (Q0, Q1), None),
        ({"base_model_name_or_path": None}, None, (Q0, Q1), None),
        ({"base_model_name_or_path": "C:\\models\\base"}, None, (Q0, Q1), None),
        (LOCAL, CARD.format("ORG/base"), (Q0, Q1), None),
        (LOCAL, CARD.format("org/other"), (Q0, Q1), "wrong_base"),
        (LOCAL, CARD.format("/home/me/base"), (Q0, Q1), None),
        (LOCAL, None, ("model.other",), "unknown_base"),
        (LOCAL, CARD.format("org/base"), ("model.other",), "no_such_module"),
        ({"base_model_name_or_path": "Org/Base/"}, None, (Q0,), None),
        ({}, CARD.format("org/other"), (Q0,), None),
    ],
)
def test_the_base_model_by_name_card_or_shape(
    tmp_path: Path,
    write_adapter: Any,
    make_tensors: Any,
    base_shapes: Shapes,
    config: dict[str, Any],
    card: str | None,
    modules: tuple[str, ...],
    reason: str | None,
) -> None:
    tensors = make_tensors(dict.fromkeys(modules, 2))
    folder = write_adapter(tmp_path / "one", config, tensors, card)
    assert look_at(folder, base_shapes).reason == reason


def test_a_base_model_that_is_a_path_is_met_by_that_path(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    folder = write_adapter(tmp_path / "one", LOCAL, card=CARD.format("org/other"))
    path = "/content/some/model"
    assert look_at(folder, base_shapes, base_model=path).status == "accepted"


def test_strangers_text_is_fit_to_print(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    config = {"target_modules": ["\ud800\x1b[2J"], "base_model_name_or_path": "o/\ud800\n"}
    document = look_at(write_adapter(tmp_path / "one", config), base_shapes)
    assert document.reason == "wrong_base"
    assert document.target_modules == ["\ufffd\ufffd[2J"]
    assert (document.detail or "").isprintable()
    document.to_line().encode("utf-8")


def test_an_earlier_checkpoint_is_superseded(
    tmp_path: Path, write_adapter: Any, base_shapes: Shapes
) -> None:
    for step in (5, 50):
        write_adapter(tmp_path / f"run/checkpoint-{step}", seed=step)
    rules = VettingRules("org/base", base_shapes, VettingLimits(), lambda *_: None)
    found = with_versions(find_adapters(tmp_path))
    looked = [FolderEvidence(one) for one in found]
    documents = [describe(one, vet(one, rules), rules) for one in looked]
    assert [(d.id, d.revision, d.status, d.reason) for d in documents] == [
        ("run", "checkpoint-5", "rejected", "superseded"),
        ("run", "checkpoint-50", "accepted", None),
    ]
    assert "run@checkpoint-50" in (documents[0].detail or "")
    # Nothing of it was read.
    assert looked[0].bytes_read == 0
    assert documents[0].rank is None


ON_THE_HUB: list[tuple[str, dict[str, Any], int]] = [
    ("gated", {"gated": "auto"}, 0),
    ("disabled", {"disabled": True}, 0),
    ("not_found", {"private": True}, 1),
    ("no_config", {"files": {"adapter_config.json": None}}, 0),
]


@pytest.mark.parametrize(("code", "facts", "requests"), ON_THE_HUB)
def test_repositories_that_cannot_be_read(
    tmp_path: Path, code: str, facts: dict[str, Any], requests: int
) -> None:
    from support.crawling import adapter, online
    from support.hub import Hub as StandIn
    from support.strangers import BASE_MODEL
    from support.strangers import base_shapes as pico_shapes

    from recycle_cli.store.hub import Hub
    from recycle_cli.store.hub_evidence import HubEvidence
    from recycle_cli.store.hub_repository import pinned
    from recycle_cli.store.room import Room

    repository = adapter("lab/one", **facts)
    with StandIn([repository]) as stand, online(stand.url):
        hub = Hub(stand.url)
        (found,) = hub.adapters_of([BASE_MODEL]) or [pinned("lab/one", repository.sha)]
        stand.reset_log()
        assert found is not None
        rules = VettingRules(BASE_MODEL, pico_shapes(), VettingLimits(), lambda *_: None)
        evidence = HubEvidence(found, hub, tmp_path / "adapters", Room())
        document = describe(evidence, vet(evidence, rules), rules)
        assert (document.status, document.reason) == ("rejected", code)
        assert (document.id, document.source) == ("lab/one", "hub")
        assert len(stand.requests) == requests
    assert not (tmp_path / "adapters").exists()


def test_every_code_that_a_check_states_is_reached_here() -> None:
    stated = {code for check in CHECKS for code in check.codes}
    reached = {code for code, _ in CONFIGS} | {code for code, _ in TENSORS}
    reached |= {feature.code for feature in UNSUPPORTED.values()}
    reached |= {"truncated", "header_too_large", "bad_header", "no_tensors"}
    reached |= {"too_large", "rank_too_large", "license_refused", "norm_out_of_range"}
    reached |= {"no_safetensors", "link_outside", "duplicate", "unknown_base"}
    reached |= {"superseded", *(code for code, _, _ in ON_THE_HUB)}
    # Of the Hub and of checkpoints, which the tests of the crawl meet.
    reached |= {*HUB_CODES, "superseded"}
    assert stated == reached


def random_update(rank: int, scale: float, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 13, generator=generator)
    return LowRankUpdate(a, torch.randn(7, rank, generator=generator), scale)


@pytest.mark.parametrize(("rank", "scale"), [(1, 2.0), (4, -0.5), (20, 3.0)])
def test_the_norm_equals_the_dense_one(rank: int, scale: float) -> None:
    update = random_update(rank, scale)
    dense = update.to(torch.float64).dense()
    assert squared_norm(update) == pytest.approx(float((dense**2).sum()), rel=1e-12)


def test_the_norm_of_nothing_is_zero() -> None:
    update = random_update(2, 1.0)
    assert squared_norm(LowRankUpdate(update.A, update.B * 0, 1e308)) == 0.0
    half = torch.tensor([[1.0], [0.0]])
    assert squared_norm(LowRankUpdate(update.A * half, update.B * (1 - half.T), 1.0)) == 0.0


def test_the_norm_of_several_modules() -> None:
    pieces = {"b": random_update(2, 1.0, 1), "a": random_update(3, 2.0, 2)}
    norms = module_norms(pieces)
    assert list(norms) == ["a", "b"]
    dense = [float((piece.to(torch.float64).dense() ** 2).sum()) for piece in pieces.values()]
    assert total_norm(norms) == pytest.approx(sum(dense) ** 0.5, rel=1e-12)


def test_the_fingerprint_names_the_update_and_not_its_factors() -> None:
    def of(piece: LowRankUpdate) -> str:
        return fingerprint({"a": piece.rank}, module_norms({"a": piece}))

    piece = random_update(4, 2.0)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))
    turned = LowRankUpdate(turn.T @ piece.A * 2.0, piece.B @ turn / 2.0, 2.0)
    assert of(turned) == of(piece)
    assert of(LowRankUpdate(piece.A, piece.B * 2.0, 1.0)) == of(piece)
    assert of(LowRankUpdate(piece.A, piece.B, 2.01)) != of(piece)


def real_data() -> Path:
    folder = os.environ.get("RECYCLE_DATA")
    if not folder:
        pytest.skip("RECYCLE_DATA is unset: it names the folder of real configs and adapters")
    return Path(folder)


def test_real_configurations_raise_nothing_but_adapter_problem(tmp_path: Path) -> None:
    files = sorted((real_data() / "adapter_configs").glob("*.json"))
    codes: dict[str, int] = {}
    for file in files:
        (tmp_path / "adapter_config.json").write_bytes(file.read_bytes())
        evidence = FolderEvidence(FoundFolder("one", tmp_path, tmp_path))
        try:
            evidence_config = evidence.config
            assert evidence_config == parse_config(read_config(tmp_path))
            code = "plain"
        except AdapterProblem as problem:
            code = problem.code
        codes[code] = codes.get(code, 0) + 1
    assert len(files) >= 100
    assert codes["plain"] >= 20
    assert codes["not_causal_lm"] >= 20
    assert codes["bad_config"] >= 2


def smollm2_shapes() -> Shapes:
    widths = {"self_attn.q_proj": (576, 576), "self_attn.o_proj": (576, 576)}
    widths |= {"self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576)}
    widths |= {"mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576)}
    widths |= {"mlp.down_proj": (576, 1536)}
    return {f"model.layers.{n}.{name}": shape for n in range(30) for name, shape in widths.items()}


def test_real_adapters_pass(tmp_path: Path) -> None:
    pool = real_data() / "pool"
    shapes = smollm2_shapes()
    some = sorted(path.parent for path in pool.rglob("adapter_config.json"))[::4]
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    documents = [look_at(folder, shapes, base_model=name) for folder in some]
    assert len(documents) >= 6
    assert {document.reason for document in documents} == {None}
    assert all(0.0 < (document.norm or 0.0) < 100.0 for document in documents)
    config = json.loads((some[0] / "adapter_config.json").read_text())
    assert documents[0].alpha == config["lora_alpha"]


def test_a_crafted_header_costs_little(tmp_path: Path) -> None:
    ranks = {f"l.{'a' * 40}{number}.q.proj": 2 for number in range(5000)}
    names = [f"x{number}" for number in range(20_000)]
    config = {"rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": names}
    folder = put_adapter(tmp_path / "a", 1, **config)
    tensors = {
        f"base_model.model.model.layers.{n}.q_proj.lora_{f}.weight": torch.zeros(shape)
        for n in range(7000)
        for f, shape in (("A", (2, 6)), ("B", (6, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    evidence = FolderEvidence(FoundFolder("a", folder, tmp_path))
    rules = VettingRules("org/base", {"q_proj": (6, 6)}, VettingLimits(), lambda *_: None)
    before = time.process_time()
    assert vet(evidence, rules).reason == "no_such_module"
    assert time.process_time() - before < 3.0


def test_targets_are_found_among_many_names() -> None:
    names = tuple(f"x{number}" for number in range(50_000))
    config = AdapterConfig(4, 8.0, target_modules=(*names, "q_proj"), targets_listed=True)
    before = time.process_time()
    for number in range(1000):
        assert not config.leaves_out(f"model.layers.{number}.self_attn.q_proj")
        assert config.leaves_out(f"model.layers.{number}.self_attn.k_proj")
    assert time.process_time() - before < 1.0
