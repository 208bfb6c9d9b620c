"""The base model: found, loaded once, and described."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recycle_cli.engine.device import Compute, choose_compute
from recycle_cli.engine.embedded import embedded_model_folder, missing_model_error
from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import EMBEDDED_ID, canonical_base_name, same_base_model
from recycle_cli.settings import Settings

Shapes = dict[str, tuple[int, int]]
"""The linear modules of a model: path -> (out, in)."""


@dataclass(frozen=True)
class BaseModel:
    """A causal language model with its tokenizer, frozen and in evaluation mode.

    Args:
        id: its canonical name, which adapters of it carry.
        model: the transformers model.
        tokenizer: its tokenizer, with a padding token.
        compute: device and dtype of the weights.
    """

    id: str
    model: Any
    tokenizer: Any
    compute: Compute

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (positions, vocabulary) from the backbone's last hidden states (positions, width).

        Applied to chosen positions only: that is what makes a pass cheap.
        """
        config = self.model.config
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    @property
    def shapes(self) -> Shapes:
        """Its linear modules."""
        return _linear_shapes(self.model)


def load_base_model(name: str, settings: Settings) -> BaseModel:
    """Loads a base model: `smollm2`, a Hub id, or a local folder.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    _quieten_transformers()
    where = _locate(name, settings)
    compute = choose_compute(settings)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=settings.offline)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=compute.dtype, local_files_only=settings.offline
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(compute.device).eval().requires_grad_(False)
    base = BaseModel(canonical_base_name(name), model, tokenizer, compute)
    _check_head(base)
    return base


def linear_shapes(name: str, settings: Settings) -> Shapes:
    """The linear modules of a base model, from its configuration alone: no weights are read.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    _quieten_transformers()
    where = _locate(name, settings)
    with _explained(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(where, local_files_only=settings.offline)
        return _linear_shapes(AutoModelForCausalLM.from_config(config))


def _linear_shapes(model: nn.Module) -> Shapes:
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _locate(name: str, settings: Settings) -> str:
    """What transformers shall load: a folder, or the name itself where the Hub has to be asked."""
    if Path(name).is_dir():
        return str(Path(name).absolute())
    if not same_base_model(name, EMBEDDED_ID):
        return name
    folder = embedded_model_folder(settings)
    if folder is not None:
        return str(folder)
    if settings.offline:
        raise missing_model_error()
    return EMBEDDED_ID


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns transformers' ways of saying that a model cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if same_base_model(name, EMBEDDED_ID):
            raise missing_model_error() from error
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the base model {name!r} cannot be loaded: {reason}",
            "give a local folder, a Hub id that this machine can reach, or smollm2",
        ) from error


def _quieten_transformers() -> None:
    """Third-party bars and warnings would mix with ours on the terminal."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@torch.no_grad()
def _check_head(base: BaseModel) -> None:
    """Compares the head applied by hand with the model's own logits on a few tokens.

    Raises:
        InputError: the model does something to its logits that `BaseModel.head` does not know.
    """
    tokens = torch.arange(4, device=base.compute.device)[None]
    whole: Tensor = base.model(tokens, use_cache=False).logits[0]
    hidden = base.model.base_model(tokens, use_cache=False).last_hidden_state[0]
    by_hand = base.head(hidden)
    if by_hand.shape != whole.shape or not torch.allclose(by_hand, whole, rtol=1e-2, atol=1e-2):
        raise InputError(
            f"the base model {base.id!r} does not compute its logits from its last hidden state",
            "use a causal language model with an ordinary output head",
        )
