import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.lora.base_names import (
    EMBEDDED_ID,
    canonical_base_name,
    copies_of,
    names_copy_of,
    same_base_model,
)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", HUB_ID),
        ("SmolLM2", HUB_ID),
        (HUB_ID, HUB_ID),
        ("smollm2-135m", "smollm2-135m"),
        ("Org/Base", "Org/Base"),
    ],
)
def test_the_name_that_is_kept(name: str, expected: str) -> None:
    assert canonical_base_name(name) == expected


SAME = [
    ("org/base", "Org/BASE"),
    ("org/base", " org/base/ "),
    ("smollm2", HUB_ID.upper()),
    ("/models/base/", "/models/base"),
    ("smollm2/", HUB_ID),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_of_one_model(one: str, other: str) -> None:
    assert same_base_model(one, other)
    assert same_base_model(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("org/base", "base"),
        ("org/base", "org/base-instruct"),
        ("org/base", "other/base"),
        ("/models/org/base", "org/base"),
        ("smollm2", "SmolLM2-135M-Instruct"),
    ],
)
def test_names_of_two_models(one: str, other: str) -> None:
    assert not same_base_model(one, other)
    assert not same_base_model(other, one)


BASE = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    "name",
    [
        BASE,
        "META-LLAMA/llama-3.1-8b-instruct/",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "unsloth/Llama-3.1-8B-Instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
        "unsloth/llama-3.1-8b-instruct-unsloth-bnb-4bit",
        "meta-llama/Llama-3.1-8B-Instruct-bnb-8bit",
    ],
)
def test_copies_that_people_train_on(name: str) -> None:
    assert names_copy_of(name, BASE)


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-8B-Instruct",
        "someone/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct-abliterated",
        "unsloth/Llama-3.1-8B-Instruct-abliterated-bnb-4bit",
        "unsloth/Llama-3.1-8B",
        "x/meta-llama/Llama-3.1-8B-Instruct",
        "",
    ],
)
def test_what_only_sounds_alike_is_no_copy(name: str) -> None:
    assert not names_copy_of(name, BASE)


@given(st.text("abcXYZ019-._/", max_size=20), st.text("abcXYZ019-.", min_size=1, max_size=9))
def test_no_part_of_a_name_makes_a_copy(name: str, more: str) -> None:
    assert names_copy_of(name, BASE) == names_copy_of(name.upper(), BASE)
    assert not names_copy_of(f"{BASE}x{more}", BASE)
    assert not names_copy_of(f"{more}x{BASE}", BASE)
    assert not names_copy_of(BASE[: len(BASE) - len(more)], BASE)


def test_every_copy_that_is_listed_is_one() -> None:
    names = copies_of(BASE)
    assert names[0] == BASE
    assert all(names_copy_of(name, BASE) for name in names)
    assert len(set(names)) == len(names) == 7
    assert copies_of("smollm2")[0] == EMBEDDED_ID
    assert copies_of("/models/mine") == copies_of("gpt2") == []
