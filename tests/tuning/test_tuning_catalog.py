import pytest

from recycle_cli.errors import InputError
from recycle_cli.tuning.catalog import METHODS, find_tuning_method


def test_methods_are_found_by_name() -> None:
    for name in METHODS:
        assert find_tuning_method(name).name == name
    with pytest.raises(InputError, match="unknown tuning method 'recycel'") as caught:
        find_tuning_method("recycel")
    assert "did you mean recycle" in caught.value.hint
