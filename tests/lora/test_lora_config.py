import math
import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from recycle_cli.errors import ExitCode
from recycle_cli.lora.config import MAX_RANK, UNSUPPORTED, AdapterConfig, AdapterProblem
from recycle_cli.lora.config import parse_config as parse

PLAIN: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def refusal(given_fields: Any) -> AdapterProblem:
    with pytest.raises(AdapterProblem) as caught:
        parse(given_fields)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    return caught.value


def test_every_field_that_decides_the_update_is_read() -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    names = {"target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "org/base"}
    assert parse(PLAIN | patterns | names | {"use_rslora": True}) == AdapterConfig(
        rank=4,
        alpha=8.0,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3.0},
        target_modules=("q_proj", "v_proj"),
        targets_listed=True,
        base_model="org/base",
    )


def test_what_is_left_out_is_as_in_peft() -> None:
    config = parse({"peft_type": "LORA", "r": 2})
    assert config == AdapterConfig(rank=2, alpha=float(LoraConfig().lora_alpha))


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("r", MAX_RANK, "rank", MAX_RANK),
        ("lora_alpha", -0.5, "alpha", -0.5),
        ("use_rslora", None, "use_rslora", False),
        ("rank_pattern", None, "rank_pattern", {}),
        ("task_type", None, "rank", 4),
        ("target_modules", ".*(q|v)_proj", "target_modules", (".*(q|v)_proj",)),
        ("base_model_name_or_path", "", "base_model", None),
    ],
)
def test_values_at_the_edge_of_what_is_taken(
    name: str, value: Any, attribute: str, expected: Any
) -> None:
    assert getattr(parse(PLAIN | {name: value}), attribute) == expected


@pytest.mark.parametrize(
    ("code", "bent", "seen"),
    [
        ("not_lora", {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ("not_lora", {"peft_type": None}, "peft_type is None"),
        ("not_causal_lm", {"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ("bad_config", {"r": None}, "r is None"),
        ("bad_config", {"r": 0}, "r is 0"),
        ("bad_config", {"r": 4.0}, "r is 4.0"),
        ("bad_config", {"r": True}, "r is True"),
        ("bad_config", {"r": MAX_RANK + 1}, f"r is {MAX_RANK + 1}"),
        ("bad_config", {"lora_alpha": "16"}, "lora_alpha is '16'"),
        ("bad_config", {"lora_alpha": False}, "lora_alpha is False"),
        ("bad_config", {"lora_alpha": math.inf}, "lora_alpha is inf"),
        ("bad_config", {"lora_alpha": math.nan}, "lora_alpha is nan"),
        ("bad_config", {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ("bad_config", {"use_rslora": 1}, "use_rslora is 1"),
        ("bad_config", {"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
        ("bad_config", {"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ("bad_config", {"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern['q_proj'] is '8'"),
        ("bad_config", {"target_modules": [3]}, "target_modules is [3]"),
        ("bad_config", {"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
        ("pattern_regex", {"rank_pattern": {".*q_proj": 2}}, "'.*q_proj'"),
        ("pattern_regex", {"alpha_pattern": {"^q_proj": 2}}, "'^q_proj'"),
        ("pattern_regex", {"alpha_pattern": {"q_proj\n": 2}}, r"'q_proj\n'"),
    ],
)
def test_refused_values(code: str, bent: dict[str, Any], seen: str) -> None:
    problem = refusal(PLAIN | bent)
    assert (problem.code, seen in problem.message) == (code, True), problem.message


@pytest.mark.parametrize("document", [[], "LORA", None, 3])
def test_what_is_no_object_is_refused(document: Any) -> None:
    assert refusal(document).code == "bad_config"


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_features_beyond_a_low_rank_update_are_refused_by_name(name: str) -> None:
    value = {"bias": "lora_only", "init_lora_weights": "pissa_niter_4"}.get(name, {"rho": 2.5})
    problem = refusal(PLAIN | {name: value})
    assert problem.code == UNSUPPORTED[name].code
    assert problem.message.startswith(f"{name} is {value!r}: ")


@pytest.mark.parametrize("value", ["pissa", "olora", "loftq", "corda", "lora_ga", "mica", "new"])
def test_initialisations_that_may_change_the_base_are_refused(value: str) -> None:
    assert refusal(PLAIN | {"init_lora_weights": value}).code == "init_alters_base"


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_taken(value: Any) -> None:
    assert parse(PLAIN | {"init_lora_weights": value}) == parse(PLAIN)


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal(PLAIN | {"bias": "x" * 10_000}).message) < 200


READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
READ |= {"peft_type", "task_type", "base_model_name_or_path"}
# They shape training, choose modules (the tensors say which), or matter only with a refused one.
HARMLESS = {"lora_dropout", "fan_in_fan_out", "inference_mode", "revision", "auto_mapping"}
HARMLESS |= {"layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core"}
HARMLESS |= {"runtime_config", "eva_config", "qalora_group_size", "ensure_weight_tying"}
HARMLESS |= {"peft_version"}


def test_every_option_of_peft_is_read_or_refused_or_harmless() -> None:
    options = {field.name for field in fields(LoraConfig)}
    assert options - READ - HARMLESS - set(UNSUPPORTED) == set()
    assert READ & HARMLESS | READ & set(UNSUPPORTED) | HARMLESS & set(UNSUPPORTED) == set()


def test_none_of_pefts_defaults_is_refused() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5).to_dict()
    config = parse({**written, "peft_type": "LORA"})
    assert (config.rank, config.alpha, config.use_rslora) == (3, 5.0, False)


@pytest.mark.parametrize(
    ("use_rslora", "expected"), [(False, {Q0: 3 / 9, V1: 6 / 4}), (True, {Q0: 3 / 3, V1: 6 / 2})]
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(
    use_rslora: bool, expected: dict[str, float]
) -> None:
    config = AdapterConfig(4, 6.0, use_rslora, rank_pattern={Q0: 9}, alpha_pattern={"q_proj": 3})
    assert {m: config.scale_of(m, config.rank_of(m)) for m in (Q0, V1)} == expected


TAILS = [Q0.split(".", start)[-1] for start in range(5)]
NEAR_MISSES = ["proj", "attn.q_proj", "_proj", "0.self_attn", "model.layers.0", "x." + Q0]
KEYS = [*TAILS, V1, "v_proj", "layers.1.self_attn.q_proj", *NEAR_MISSES]


@given(st.lists(st.sampled_from(KEYS), unique=True), st.sampled_from([Q0, V1, "q_proj"]))
def test_patterns_are_looked_up_as_peft_does(keys: list[str], module: str) -> None:
    pattern = {key: number + 1 for number, key in enumerate(keys)}
    config = AdapterConfig(99, 99.0, rank_pattern=pattern, alpha_pattern=pattern)
    expected = pattern.get(get_pattern_key(list(pattern), module), 99)
    assert (config.rank_of(module), config.alpha_of(module)) == (expected, expected)


@given(st.text("ab._", min_size=1, max_size=6), st.text("ab._", min_size=1, max_size=9))
def test_a_pattern_is_looked_up_as_peft_does(key: str, module: str) -> None:
    """PEFT takes the key for a regular expression, in which a dot is any character."""
    config = parse(PLAIN | {"alpha_pattern": {key: 7}})
    matches = re.match(rf"(.*\.)?({key})$", module) is not None
    assert (config.alpha_of(module) == 7) == matches


@pytest.mark.parametrize("layers", [None, [], 0, [1], [0, 1]])
@pytest.mark.parametrize("excluded", [None, ["v_proj"], [Q0]])
@pytest.mark.parametrize(
    "targets", [["q_proj"], [Q0], [Q0, "v_proj"], ["layers.1.self_attn.v_proj"]]
)
def test_modules_are_passed_over_as_peft_passes_over_them(
    targets: list[str], excluded: list[str] | None, layers: int | list[int] | None
) -> None:
    given_fields = {"target_modules": targets, "exclude_modules": excluded}
    config = parse(PLAIN | given_fields | {"layers_to_transform": layers})
    theirs = LoraConfig(**given_fields, layers_to_transform=layers)
    for module in (Q0, Q0.replace("0", "1"), V1, V1.replace("1", "0")):
        assert config.leaves_out(module) == (not check_target_module_exists(theirs, module)), module
