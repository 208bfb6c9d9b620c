"""How each kind of arm is marked, by colour and by shape."""

from dataclasses import dataclass

from recycle_cli.records import StudyArm
from recycle_cli.reporting.plots.canvas import BLUE, GREEN, INK, ORANGE, PAPER, PINK


@dataclass(frozen=True)
class Mark:
    """A mark; a hollow one is filled with the paper's colour."""

    colour: str
    shape: str
    hollow: bool = False

    @property
    def fill(self) -> str:
        """What the mark is filled with."""
        return PAPER if self.hollow else self.colour


MARKS = {
    "base": Mark(INK, "X"),
    "target": Mark(GREEN, "^"),
    "recycled": Mark(BLUE, "o"),
    "control": Mark(ORANGE, "s"),
    "rescaled": Mark(PINK, "D"),
    "single": Mark(BLUE, "v"),
}
WORDS = {
    "base": "base model",
    "target": "target LoRA",
    "recycled": "recycled adapters",
    "control": "random adapters",
    "rescaled": "target LoRA rescaled",
    "single": "one adapter as it is",
}


def mark_of(arm: StudyArm | None) -> Mark:
    """An arm's mark; hollow where the target LoRA has no part in it."""
    if arm is None:
        return Mark(INK, "o")
    mark = MARKS[arm.role]
    mixed = arm.role in ("recycled", "control")
    return Mark(mark.colour, mark.shape, hollow=mixed and not arm.with_target)


def words_of(arm: StudyArm | None) -> str:
    """What an arm's kind is called in a legend."""
    if arm is None:
        return "other"
    mixed = arm.role in ("recycled", "control") and arm.with_target
    return WORDS[arm.role] + (" with target LoRA" if mixed else "")
