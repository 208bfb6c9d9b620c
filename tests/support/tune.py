"""`recycle tune` on the small task and the pico model, in few steps."""

from pathlib import Path

from support.command import Done, Recycle

SHAPE = ("--rank", 4, "--target-module", "q_proj", "--target-module", "down_proj")
PACE = ("--steps", 4, "--eval-every", 2, "--batch-size", 4, "--rows", 20)


class Tune:
    """The command, with the words that are always the same."""

    def __init__(self, recycle: Recycle, task: Path, base: Path) -> None:
        self.recycle = recycle
        self.common = ("--task", task, "--base-model", base)

    def __call__(self, *words: object, out: str = "new", succeeds: bool = True) -> Done:
        return self.recycle("tune", *self.common, *words, "--out", out, "--json", succeeds=succeeds)
