"""Data sets in the form of the Hub's, in a folder or in the cache of `datasets`."""

from pathlib import Path
from typing import Any

import pytest
import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("no", "maybe", "yes")
Part = dict[str, list[Any]]


def use_cache(patch: pytest.MonkeyPatch, place: Path) -> Path:
    """Makes `datasets` keep here what it fetches."""
    import datasets  # type: ignore[import-untyped]

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place))
    return place


def pairs(count: int, start: int = 0) -> Part:
    """Rows of two texts and a label; all differ."""
    numbers = range(start, start + count)
    return {
        "premise": [f"There are {number} cats." for number in numbers],
        "hypothesis": [f"There are {number + number % 3} cats." for number in numbers],
        "label": [number % 3 for number in numbers],
    }


def write_data(
    folder: Path, names: tuple[str, ...] | None = NAMES, column: str = "label", **parts: Part
) -> Path:
    """A folder of Parquet files.

    Args:
        folder: where to.
        names: what the numbers in a column mean; None where they mean themselves.
        column: which.
        parts: a file each, by the name of the split.
    """
    from datasets import ClassLabel, Dataset

    folder.mkdir(parents=True, exist_ok=True)
    for part, columns in parts.items():
        rows = Dataset.from_dict(columns)
        if names and column in columns:
            rows = rows.cast_column(column, ClassLabel(names=list(names)))
        rows.to_parquet(str(folder / f"{part}.parquet"))
    files = [{"split": part, "path": f"{part}.parquet"} for part in parts]
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return folder


def put_in_cache(
    cache: Path, name: str, folder: Path, config: str = "default", commit: str = COMMIT
) -> None:
    """Puts a folder of Parquet files where `datasets` keeps what has come from the Hub."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    short = name.rpartition("/")[2]
    builder = Parquet(
        cache_dir=str(cache),
        dataset_name=short,
        config_name=config,
        config_id=config,
        hash=commit,
        data_files={file.stem: [str(file)] for file in folder.glob("*.parquet")},
    )
    builder.download_and_prepare()
    # The builder would name it so itself, if the files were those of a repository.
    made = Path(builder.cache_dir).parents[2]
    made.rename(made.with_name(name.replace("/", "___").replace(short, made.name)))
