import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import (
    EMBEDDED_ID,
    QUANTISED,
    base_name_given,
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


OWNERS = st.sampled_from(["org", "Meta", "unsloth", "a.b"])
NAMES = st.text("abcXYZ019.-", min_size=2, max_size=10)
ENDS = ("", "-bnb-4bit", "-bnb-8bit", "-unsloth-bnb-4bit")


@settings(max_examples=60)
@given(OWNERS, NAMES, st.sampled_from(ENDS), st.sampled_from(["own", "unsloth"]), st.data())
def test_a_copy_is_known_whatever_the_case(
    owner: str, name: str, end: str, copier: str, data: st.DataObject
) -> None:
    base, copy = f"{owner}/{name}", f"{owner if copier == 'own' else copier}/{name}{end}"
    case = st.sampled_from([str.lower, str.upper, str.title, str.swapcase, str])
    assert names_copy_of(data.draw(case)(copy), data.draw(case)(base))


@settings(max_examples=60)
@given(OWNERS, NAMES, NAMES, st.sampled_from(["own", "unsloth"]), st.sampled_from(ENDS))
def test_longer_names_and_parts_of_names_never_match(
    owner: str, name: str, more: str, copier: str, end: str
) -> None:
    base = f"{owner}/{name}"
    who = owner if copier == "own" else copier
    assume(not QUANTISED.search(f"{name}-{more}".casefold()))
    assume(not QUANTISED.search(name.casefold()))
    assume("meta" not in name.casefold() + more.casefold())
    for other in (f"{name}-{more}", f"{more}-{name}", f"{name}{more}", name[:-1], name[1:]):
        if other and other.casefold() != name.casefold():
            assert not names_copy_of(f"{who}/{other}{end}", base)
            assert not names_copy_of(base, f"{who}/{other}{end}")


@settings(max_examples=60)
@given(OWNERS, NAMES, st.text(max_size=20))
def test_a_name_that_holds_another_is_no_copy_of_it(owner: str, name: str, text: str) -> None:
    base = f"{owner}/{name}"
    for other in (name, f"x{base}", f"{base}/{name}", f"hub/{base}", f"{text}/{base}"):
        assert not names_copy_of(other, base)
    # Somebody else's model of the same name may be anything.
    assert not names_copy_of(f"stranger/{name}", base)


@pytest.mark.parametrize(
    ("name", "base_model", "is_copy"),
    [
        ("unsloth/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("unsloth/meta-llama-3.1-8b-instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct", True),
        (
            "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit",
            "meta-llama/Llama-3.1-8B-Instruct",
            True,
        ),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("unsloth/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("unsloth/Llama-3.1-8B-Instruct-GGUF", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("NousResearch/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("meta-llama/Llama-3.2-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", "smollm2", True),
        ("base", "base", True),
        ("unsloth/base", "base", False),
        ("/models/base-bnb-4bit", "/models/base", True),
        ("", "org/base", False),
    ],
)
def test_copies_of_well_known_models(name: str, base_model: str, is_copy: bool) -> None:
    assert names_copy_of(name, base_model) is is_copy


@pytest.mark.parametrize("base_model", ["meta-llama/Llama-3.1-8B", "org/base", "smollm2", "o/b/"])
def test_the_names_that_are_listed_are_those_of_copies(base_model: str) -> None:
    names = copies_of(base_model)
    assert names[0] == canonical_base_name(base_model.rstrip("/"))
    assert len(names) == len(set(names)) >= 4
    assert all(names_copy_of(name, base_model) for name in names)


@pytest.mark.parametrize("base_model", ["/models/base", "base", "a/b/c", "", "/"])
def test_a_folder_has_no_copies_on_the_hub(base_model: str) -> None:
    assert copies_of(base_model) == []


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_none(name: str) -> None:
    with pytest.raises(InputError, match="empty"):
        base_name_given(name)
