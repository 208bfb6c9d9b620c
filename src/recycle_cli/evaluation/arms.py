"""What a study compares: its arms, and the part that each plays in the verdict."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What an arm is to the verdict."""

    BASE = "base"
    TARGET = "target"
    # Any merge of adapters of the pool, learned or data-free, with or without the target LoRA.
    RECYCLED = "recycled"
    # The same with random adapters in their place.
    CONTROL = "control"
    # The target LoRA with learned coefficients of its own, and no other adapter.
    RESCALED = "rescaled"
    # The adapter of the pool that the selection puts first, as it is.
    SINGLE = "single"


@dataclass(frozen=True)
class Arm:
    """One way to get an adapter.

    Args:
        name: what tables and figures call it.
        label: what sentences call it.
        role: what it is to the verdict.
        control: the name of the arm that is the same with random adapters. The target LoRA has to
            stand on both sides, or its worth would be counted as that of recycling.
        has_target: whether the target LoRA is among what was merged.
    """

    name: str
    label: str
    role: Role
    control: str | None = None
    has_target: bool = False
