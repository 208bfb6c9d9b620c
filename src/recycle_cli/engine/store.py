"""A run kept on disk while it goes on, so that a killed one can be gone on with."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.folder import read_tensors, save_tensors

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A run after a validation.

    Args:
        tensors: parameters, the best ones, the optimizer's state, random states; by name.
        step: how many steps are done.
        best_step: the step with the lowest validation loss.
        idle: validations since.
        history: (step, validation loss in nats).
    """

    tensors: Mapping[str, Tensor]
    step: int
    best_step: int
    idle: int
    history: list[tuple[int, float]]


@dataclass(frozen=True)
class Store:
    """A folder that holds the latest snapshot of a run.

    Args:
        folder: made when something is saved.
        run: what tells this run from others: everything that shapes it, as JSON.
    """

    folder: Path
    run: Mapping[str, Any]

    @property
    def _file(self) -> Path:
        return self.folder / STATE_FILE

    def save(self, snapshot: Snapshot) -> None:
        """Replaces the snapshot; a kill meanwhile leaves the old one.

        Raises:
            RecycleError: the disk refused.
        """
        fields = {
            "step": snapshot.step,
            "best_step": snapshot.best_step,
            "idle": snapshot.idle,
            "history": snapshot.history,
            "run": self.run,
        }
        # A copy of each, since tensors that share memory cannot be saved together.
        tensors = {name: _copied(tensor) for name, tensor in snapshot.tensors.items()}
        with replacing(self._file) as beside:
            save_tensors(tensors, beside, {"run": json.dumps(fields, sort_keys=True)})

    def load(self) -> Snapshot | None:
        """The latest snapshot; None where there is none.

        Raises:
            InputError: it is that of another run, or damaged.
        """
        if not self._file.exists():
            return None
        try:
            tensors, metadata = read_tensors(self._file)
            fields = json.loads(metadata["run"])
            history = [(int(step), float(loss)) for step, loss in fields["history"]]
            kept, steps = fields["run"], (fields["step"], fields["best_step"], fields["idle"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self._file} cannot be read: {error}", f"start anew: remove {self.folder}"
            ) from error
        check_same_run(self.folder, kept, self.run)
        return Snapshot(tensors, *steps, history)


def check_same_run(folder: Path, kept: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Checks that what a folder keeps is of the run that would go on with it.

    Args:
        folder: where it is kept.
        kept: what tells its run from others, as it was read from JSON.
        run: the same of the run that goes on.

    Raises:
        InputError: it is of another run; says in what they differ.
    """
    now = json.loads(json.dumps(run))
    if kept != now:
        other = sorted(key for key in {*kept, *now} if kept.get(key) != now.get(key))
        raise InputError(
            f"the run kept in {folder} differs in {', '.join(other)}",
            "ask for the same as then, or start anew: leave out --resume and use --force",
        )


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Where to write what a file of a kept run shall hold. It takes the file's place at the end; a
    kill meanwhile leaves the old one.

    Raises:
        RecycleError: the disk refused.
    """
    beside = file.with_name(f"{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(file)
    except OSError as error:
        raise RecycleError(
            f"the state of the run cannot be kept in {file.parent}: {error}", "free some space"
        ) from error


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
