"""How well each way to train a target LoRA does in a short training at several rates, on a task of
the folder that RECYCLE_DATA names, from which no table of target LoRAs has its figures.

It goes on where it was.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.pages import DOCS, write_table
from bench.target import given_by, way_names
from bench.target_results import PRESET, TRAIN_ROWS, request
from bench.timing import machine
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.errors import RecycleError
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.progress import Silent
from recycle_cli.records import TuneDocument
from recycle_cli.settings import read_settings
from recycle_cli.tuning.lora_catalog import find_preset, lora_pace
from recycle_cli.workflows.output_folder import RECORD_FILE
from recycle_cli.workflows.tune import tune

TASK = "clinc_domain"
TIMES = (1 / 3, 1.0, 3.0)
STEPS, SEED = 30, 0


@dataclass(frozen=True)
class Trial:
    """A short training."""

    way: str
    times: float

    @property
    def lr(self) -> float:
        """Its rate: the default with the preset, so many times."""
        usual = lora_pace(given_by(self.way), find_preset(PRESET).pace["lr"])["lr"]
        return float(f"{self.times * usual:.1g}")

    def record(self, work: Path) -> Path:
        """What tells how it ended."""
        return work / TASK / f"{self.way}-{self.lr:g}" / RECORD_FILE

    def run(self, work: Path, base: BaseModel) -> None:
        """Does it."""
        pace = {"steps": STEPS, "patience": STEPS, "lr": self.lr}
        asked = request(self.way, TASK, self.record(work).parent, SEED, pace)
        tune(asked, (), None, base, Silent())


def run(work: Path, ways: Sequence[str]) -> None:
    """Does those that are not there yet; a diverged one is told and left out."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    for trial in (Trial(way, times) for way in ways for times in TIMES):
        if trial.record(work).exists():
            continue
        try:
            trial.run(work, base)
        except RecycleError as error:
            print(f"{trial}: {error}", flush=True)
        else:
            print(trial, flush=True)


def table(work: Path, ways: Sequence[str]) -> Iterator[str]:
    """The Markdown of the ways of which there is something."""
    yield "| way | rates | best validation losses |\n|---|---|---|"
    for way in ways:
        trials = [Trial(way, times) for times in TIMES]
        if not any(trial.record(work).exists() for trial in trials):
            continue
        rates = ", ".join(f"{trial.lr:g}" for trial in trials)
        yield f"| {way} | {rates} | {', '.join(_loss(work, trial) for trial in trials)} |"
    yield (
        f"\nIn nats; {STEPS} steps of `--preset {PRESET}` on {TRAIN_ROWS} rows of {TASK}, a fifth "
        f"of them for validation, seed {SEED}. {machine()}"
    )


def _loss(work: Path, trial: Trial) -> str:
    record = trial.record(work)
    if not record.exists():
        return "-"
    found = TuneDocument.model_validate_json(record.read_text(encoding="utf-8")).best
    return f"{found.valid_loss:.3f}" if found.step else "none below the start"


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where results are kept")
    names = way_names()
    parser.add_argument("--option", action="append", choices=names, default=[], help="only these")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="keep the table in docs")
    options = parser.parse_args()
    if not options.tables:
        run(options.work, options.option or names)
    text = "\n".join(table(options.work, names))
    print(text)
    if options.write:
        write_table(DOCS / "target-lora.md", "rates", text)


if __name__ == "__main__":
    main()
