"""Which device and dtype to compute in, chosen once and with the reason said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
# bfloat16 costs accuracy, so it has to earn its place: on a CPU with these instructions (x86 and
# ARM) it is two to three times faster, on one without them slower. They are asked for, not timed:
# on a busy machine times would have the dtype, and so every result, change from run to run.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


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
    has = _cpu_instructions()
    found = next((name for name in BFLOAT16_INSTRUCTIONS if has.get(name)), None)
    if found:
        return torch.bfloat16, f"this CPU has instructions for bfloat16 ({found})"
    return torch.float32, "this CPU has no instructions for bfloat16"


def _cpu_instructions() -> Mapping[str, Any]:
    """Which sets of instructions the CPU has; nothing where torch does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    has: Mapping[str, Any] = tell()
    return has
