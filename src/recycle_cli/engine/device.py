"""Which device and dtype to compute in, chosen once and with the reason said."""

import time
from dataclasses import dataclass

import torch

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
# bfloat16 costs accuracy, so it has to earn its place: on a CPU with the instructions it is two to
# three times faster, on one without them slower.
CPU_SPEEDUP_WANTED = 1.3


@dataclass(frozen=True)
class Compute:
    """Where the base model runs, in which dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_compute(settings: Settings) -> Compute:
    """The device and dtype for the base model.

    Raises:
        InputError: `RECYCLE_DEVICE` or `RECYCLE_DTYPE` is unknown, or the device is not there.
    """
    device = _choose_device(settings.device)
    if settings.dtype == "auto":
        dtype, reason = _choose_dtype(device)
    elif settings.dtype in DTYPES:
        dtype, reason = DTYPES[settings.dtype], "as RECYCLE_DTYPE says"
    else:
        raise unknown_name("RECYCLE_DTYPE", settings.dtype, ["auto", *DTYPES])
    return Compute(device, dtype, reason)


def _choose_device(wanted: str) -> torch.device:
    if wanted not in DEVICES:
        raise unknown_name("RECYCLE_DEVICE", wanted, DEVICES)
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, present in there.items() if present))
    if not there[wanted]:
        raise InputError(
            f"RECYCLE_DEVICE is {wanted!r}, but this machine has none", "unset it, or use 'cpu'"
        )
    return torch.device(wanted)


def _choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU computes in bfloat16"
        return torch.float16, "the GPU does not compute in bfloat16"
    if device.type == "mps":
        return torch.float32, "mps is exact in float32 only"
    speedup = _bfloat16_speedup()
    if speedup >= CPU_SPEEDUP_WANTED:
        return torch.bfloat16, f"this CPU multiplies bfloat16 {speedup:.1f} times as fast"
    return torch.float32, f"this CPU multiplies bfloat16 only {speedup:.1f} times as fast"


def _bfloat16_speedup() -> float:
    """How much faster this CPU multiplies bfloat16 matrices than float32 ones."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 576, dtype=dtype)
        weight = torch.ones(1536, 576, dtype=dtype)
        times[dtype] = min(_seconds(x, weight) for _ in range(5))
    return times[torch.float32] / times[torch.bfloat16]


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - start
