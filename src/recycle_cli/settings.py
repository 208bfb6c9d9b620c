"""Paths and environment, read once at the start and passed down."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the environment and the global options say.

    Args:
        home: the folder that holds everything recycle keeps: converted base models, the adapter
            cache and the catalog. Nothing is written outside it but what `--out` names.
        offline: no network access, whatever the command.
        dtype: the dtype of the base model's weights: "auto" (chosen by a probe), "float32",
            "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "mps".
    """

    home: Path
    offline: bool = False
    dtype: str = "auto"
    device: str = "auto"

    @property
    def catalog_file(self) -> Path:
        """The SQLite file of the index."""
        return self.home / "catalog.sqlite"

    @property
    def adapters_folder(self) -> Path:
        """The adapter cache: one clean PEFT folder for each weights sha256."""
        return self.home / "adapters"

    @property
    def models_folder(self) -> Path:
        """Base models that recycle converted itself."""
        return self.home / "models"


def read_settings(
    home: Path | None = None, offline: bool = False, environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settings from global options and environment; options win.

    Reads `RECYCLE_HOME`, `RECYCLE_DTYPE`, `RECYCLE_DEVICE` and `HF_HUB_OFFLINE`.
    """
    return Settings(
        home=(home or _default_home(environ)).expanduser().absolute(),
        offline=offline or environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        dtype=environ.get("RECYCLE_DTYPE", "auto"),
        device=environ.get("RECYCLE_DEVICE", "auto"),
    )


def _default_home(environ: Mapping[str, str]) -> Path:
    if environ.get("RECYCLE_HOME"):
        return Path(environ["RECYCLE_HOME"])
    import platformdirs

    return Path(platformdirs.user_cache_dir("recycle"))
