import pytest

from recycle_cli.lora.base_names import canonical_base_name, same_base_model

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
