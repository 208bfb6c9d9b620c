"""Result folders: whole or not there at all, and never over something that is."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import Document

if TYPE_CHECKING:
    import torch

RECORD_FILE = "recycle.json"
RESULT_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", RECORD_FILE}
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def check_save_dtype(name: str) -> None:
    """Checks the dtype that factors are to have on disk.

    Raises:
        InputError: it is none of SAVE_DTYPES.
    """
    if name not in SAVE_DTYPES:
        raise InputError(f"--save-dtype is {name!r}", f"use one of {', '.join(SAVE_DTYPES)}")


def dtype_named(name: str) -> "torch.dtype":
    """The dtype of that name, one of SAVE_DTYPES."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_output(out: Path, force: bool, sources: Sequence[str] = ()) -> None:
    """Checks, before any work is done, that a result may go to `out`.

    Args:
        out: the folder to be.
        force: whether an earlier result may be replaced.
        sources: the folders that the result is made of, which it must not replace.

    Raises:
        InputError: something is there and `force` is not given or it is no result of ours, or
            its parent cannot be written to.
    """
    if os.path.lexists(out) and not force:
        raise InputError(f"{out} exists", "name another folder with --out, or replace it: --force")
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out} is no folder", "name a folder with --out")
    if out.resolve() in {Path(source).resolve() for source in sources}:
        raise InputError(f"{out} is what the result is made of", "name another folder with --out")
    if out.is_dir() and not _is_result(out):
        raise InputError(
            f"{out} holds more than a result of recycle, so --force leaves it alone",
            "name another folder with --out",
        )
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest} cannot be written to", "name another folder with --out")


def _is_result(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or holds what recycle writes and no more."""
    if not any(folder.iterdir()):
        return True
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return RECORD_FILE in there and there <= RESULT_FILES | _recorded_files(folder)


def _recorded_files(folder: Path) -> set[str]:
    """The names that the record says were written; none where it is not ours."""
    try:
        files = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["files"]
        return {name for name in files if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_record(file: Path, document: Document) -> None:
    """Writes a document as the one line that a command prints."""
    file.write_text(document.to_line() + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write a result into, which becomes `out` when the block ends well.

    It lies beside `out`, so that the last step is one rename; if the block fails, it is removed
    and `out` is as it was.

    Raises:
        InputError: as `check_output`.
        RecycleError: the disk refused.
    """
    check_output(out, force)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    except OSError as error:
        raise RecycleError(f"{out} cannot be written: {error}", "choose another --out") from error
    try:
        yield beside
        beside.chmod(0o755)
        _replace(beside, out)
    except OSError as error:
        raise RecycleError(f"{out} cannot be written: {error}", "free some space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(beside: Path, out: Path) -> None:
    if not out.exists():
        beside.rename(out)
        return
    old = beside.with_name(beside.name + ".old")
    out.rename(old)
    try:
        beside.rename(out)
    except OSError:
        old.rename(out)
        raise
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
