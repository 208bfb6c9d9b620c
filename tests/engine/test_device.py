import re
from pathlib import Path

import pytest
import torch

from recycle_cli.engine.device import DTYPES, choose_compute
from recycle_cli.errors import InputError
from recycle_cli.settings import read_settings


def settings(tmp_path: Path, **environ: str):
    return read_settings(tmp_path, environ={f"RECYCLE_{key}": environ[key] for key in environ})


@pytest.mark.parametrize(
    ("environ", "message", "names"),
    [
        ({"DTYPE": "bfloat"}, "unknown RECYCLE_DTYPE 'bfloat'", ["auto", *DTYPES]),
        ({"DTYPE": "zzz"}, "unknown RECYCLE_DTYPE 'zzz'", ["auto", *DTYPES]),
        ({"DEVICE": "gpu"}, "unknown RECYCLE_DEVICE 'gpu'", ["auto", "cpu", "cuda", "mps"]),
    ],
)
def test_unknown_names_are_refused(
    tmp_path: Path, environ: dict[str, str], message: str, names: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        choose_compute(settings(tmp_path, **{"DEVICE": "cpu", **environ}))
    assert caught.value.message == message
    assert set(names) <= set(re.findall(r"\w+", caught.value.hint))


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        choose_compute(settings(tmp_path, DEVICE="cpu", DTYPE="fp16"))
    assert "did you mean float16" in caught.value.hint


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_named_dtype_is_taken(tmp_path: Path, name: str) -> None:
    compute = choose_compute(settings(tmp_path, DEVICE="cpu", DTYPE=name))
    assert (compute.device.type, compute.dtype) == ("cpu", getattr(torch, name))
    assert compute.reason == "as RECYCLE_DTYPE says"


def test_on_a_cpu_bfloat16_needs_its_instructions(tmp_path: Path) -> None:
    """As Linux tells them; on other systems nothing stands against it here."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = set(re.findall(r"\w+", cpuinfo.read_text()))
    compute = choose_compute(settings(tmp_path, DEVICE="cpu"))
    expected = bool({"amx_bf16", "avx512_bf16", "bf16", "svebf16"} & flags)
    assert compute.dtype == (torch.bfloat16 if expected else torch.float32)
    assert ("has no instructions" in compute.reason) is not expected


@pytest.mark.parametrize(
    ("name", "there"),
    [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())],
)
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, name: str, there: bool) -> None:
    chosen = settings(tmp_path, DEVICE=name, DTYPE="float32")
    if there:
        assert choose_compute(chosen).device.type == name
        return
    with pytest.raises(InputError, match=f"RECYCLE_DEVICE is '{name}', but this machine has none"):
        choose_compute(chosen)


def test_the_best_device_there_is_is_taken(tmp_path: Path) -> None:
    best = choose_compute(settings(tmp_path, DTYPE="float32")).device.type
    if torch.cuda.is_available():
        assert best == "cuda"
    else:
        assert best == ("mps" if torch.backends.mps.is_available() else "cpu")
