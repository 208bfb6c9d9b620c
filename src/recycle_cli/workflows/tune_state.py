"""What a tuning keeps: its state while it goes on, and the mixture that a later one starts from."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_cli import __version__
from recycle_cli.errors import InputError
from recycle_cli.progress import Progress
from recycle_cli.records import SweepTrial
from recycle_cli.tuning.catalog import SHAPING
from recycle_cli.workflows.provenance import shown
from recycle_cli.workflows.tune_request import TuneRequest

if TYPE_CHECKING:
    from recycle_cli.engine.store import Store
    from recycle_cli.tuning.tuned import Tuned
    from recycle_cli.workflows.tune_job import Job

MIXTURE_FILE = "mixture.safetensors"
COEFFICIENTS_FILE = "coefficients.json"
SWEEP_FILE = "sweep.json"
DIGITS = 6
DIFFERS = {"method": "another method", "adapters": "other adapters or their order"}


@contextlib.contextmanager
def unfinished(request: TuneRequest, progress: Progress) -> Iterator[Path]:
    """Where the state of the run is kept until it has ended well, or cannot."""
    from recycle_cli.engine.training import Diverged

    state = request.state_folder
    if not request.resume:
        shutil.rmtree(state, ignore_errors=True)
    try:
        yield state
    except Diverged:
        shutil.rmtree(state, ignore_errors=True)
        raise
    except BaseException:
        if state.exists():
            progress.message(f"The run is kept in {shown(state)}: go on with it with --resume.")
        raise
    shutil.rmtree(state, ignore_errors=True)


class SweepState:
    """The short trainings of a sweep that have ended, kept with the run while it goes on.

    Attributes:
        trials: by name.
        elapsed_s: what they took, in all processes.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Takes up what is kept there.

        Args:
            folder: of the run.
            run: what tells it from others, as in `Store`.

        Raises:
            InputError: what is kept is of another run, or damaged.
        """
        self._file, self._run = folder / SWEEP_FILE, run
        self.trials: dict[str, SweepTrial] = {}
        self.elapsed_s = 0.0
        if self._file.exists():
            self._load()

    def _load(self) -> None:
        from recycle_cli.engine.store import check_same_run

        try:
            fields = json.loads(self._file.read_text(encoding="utf-8"))
            kept = fields["run"]
            self.elapsed_s = float(fields["elapsed_s"])
            for name, trial in fields["trials"].items():
                self.trials[name] = SweepTrial.model_validate(trial)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self._file} cannot be read: {error}",
                "start anew: leave out --resume and use --force",
            ) from error
        check_same_run(self._file.parent, kept, self._run)

    def save(self) -> None:
        """Replaces what is kept; a kill meanwhile leaves the old.

        Raises:
            RecycleError: the disk refused.
        """
        from recycle_cli.engine.store import replacing

        trials = {name: trial.model_dump(mode="json") for name, trial in self.trials.items()}
        fields = {"run": self._run, "elapsed_s": self.elapsed_s, "trials": trials}
        with replacing(self._file) as beside:
            beside.write_text(json.dumps(fields), encoding="utf-8")


def store_of(job: "Job", settings: Mapping[str, Any]) -> "Store":
    """Where the run is kept while it goes on, known by all that shapes it."""
    from recycle_cli.engine.store import Store

    request = job.request
    # How many rows a pass takes depends on what memory is free; it changes no more than rounding.
    rows_a_pass = "batch_size" if job.searches else "micro_batch"
    run = {
        **{name: value for name, value in settings.items() if name != rows_a_pass},
        "method": request.method,
        "base_model": request.base_model,
        "task": request.task.sha256,
        "adapters": [source.ref.sha256 for source in job.mixed],
        "target": job.target.ref.sha256 if job.target else None,
        "version": __version__,
    }
    return Store(job.state / request.method, run)


def write_mixture(job: "Job", tuned: "Tuned") -> None:
    """Writes the trained numbers by name, and what they are about, beside the adapter; and what
    the coefficients came to in each module, for people and plots.

    Raises:
        OSError: the disk refused.
    """
    from recycle_cli.lora.folder import save_tensors

    save_tensors(tuned.state(), job.folder / MIXTURE_FILE, {"format": "pt", **_about(job)})
    by_module = tuned.by_module()
    if by_module:
        fields = {
            "adapters": [source.ref.id for source in job.mixed],
            "modules": {
                path: [round(number, DIGITS) for number in numbers.tolist()[: len(job.mixed)]]
                for path, numbers in by_module.items()
            },
        }
        (job.folder / COEFFICIENTS_FILE).write_text(json.dumps(fields) + "\n", encoding="utf-8")


def start_from(job: "Job", folder: Path, tuned: "Tuned") -> None:
    """Takes the numbers of an earlier run.

    Raises:
        InputError: there are none, or they are about other adapters or settings.
    """
    from safetensors import SafetensorError

    from recycle_cli.lora.folder import read_tensors

    path = folder / MIXTURE_FILE
    try:
        state, about = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--init-from {folder} has no readable {MIXTURE_FILE}: {error}",
            "name a folder that recycle tune wrote from adapters",
        ) from error
    for key, value in _about(job).items():
        if about.get(key) != value:
            raise InputError(
                f"{path} is about {DIFFERS.get(key, 'another ' + key)}: {about.get(key)}, "
                f"where this run has {value}",
                "use the same method, adapters and settings as there",
            )
    tuned.load(state)


def _about(job: "Job") -> dict[str, str]:
    """What the numbers of a mixture are about, in words that metadata take."""
    request, sha256s = job.request, [source.ref.sha256 for source in job.mixed]
    drawn = f" with seed {request.seed}" if request.reinit != "none" else ""
    shaping = {name: job.settings[name] for name in SHAPING if name in job.settings}
    return {
        "method": request.method,
        "adapters": json.dumps(sha256s),
        "target": job.target.ref.sha256 if job.target else "none",
        "reinit": request.reinit + drawn,
        **{name: str(value) for name, value in shaping.items()},
    }
