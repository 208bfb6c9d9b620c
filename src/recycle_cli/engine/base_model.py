"""The base model: found, loaded once, and described."""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recycle_cli.engine.device import Compute, choose_compute
from recycle_cli.engine.embedded import embedded_model_folder, find_gguf, missing_model_error
from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import EMBEDDED_ID, canonical_base_name, same_base_model
from recycle_cli.settings import Settings

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")

SAMPLED = 64
"""Numbers of each weight that `BaseModel.digest` looks at."""

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

    def check_length(self, tokens: int) -> None:
        """Checks that the model sees a row of this many tokens as a whole.

        Raises:
            InputError: it is longer than the model's context, or than the window that some of its
                layers attend to, which padding and a shared beginning would shift.
        """
        config = self.model.config.get_text_config()
        limits = {"context": getattr(config, "max_position_embeddings", None)}
        kinds = getattr(config, "layer_types", None)
        if kinds is None or any("sliding" in kind for kind in kinds):
            limits["attention window"] = getattr(config, "sliding_window", None)
        for name, limit in limits.items():
            if limit is not None and tokens > limit:
                raise InputError(
                    f"a row has {tokens} tokens, padding included; the {name} of {self.id} is "
                    f"{limit}",
                    "shorten the longest inputs, or use another base model",
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def shapes(self) -> Shapes:
        """Its linear modules."""
        return _linear_shapes(self.model)

    @functools.cached_property
    def digest(self) -> str:
        """Hex digits that stand for its weights and its prompts: of a few numbers of every weight,
        so that it costs nothing, and of the chat template."""
        state = hashlib.sha256(str(self.tokenizer.chat_template).encode())
        for name, weight in self.model.state_dict().items():
            numbers = weight.flatten()[:: max(1, weight.numel() // SAMPLED)][: SAMPLED + 1]
            state.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            state.update(numbers.double().cpu().numpy().tobytes())
        return state.hexdigest()


def load_base_model(name: str, settings: Settings) -> BaseModel:
    """Loads a base model: `smollm2`, a Hub id, or a local folder.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    _quieten_transformers()
    compute = choose_compute(settings)
    with _explained(name):
        where = _locate(name, settings)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=compute.dtype, local_files_only=settings.offline, output_loading_info=True
        )
    model, loading = loaded
    _check_complete(name, loading["missing_keys"])
    with _explained(name, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=settings.offline)
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
    with _explained(name):
        where = _locate(name, settings)
        config = AutoConfig.from_pretrained(where, local_files_only=settings.offline)
    with _explained(name), torch.device("meta"):
        return _linear_shapes(AutoModelForCausalLM.from_config(config))


def base_model_folder(name: str, settings: Settings) -> Path:
    """The folder with a base model's files: a local one, the embedded model's, or that of the
    Hub's cache, which is filled first where that is needed and allowed.

    Raises:
        InputError: there is no such model.
    """
    _quieten_transformers()
    with _explained(name):
        where = _locate(name, settings)
        if Path(where).is_dir():
            return Path(where)
        return Path(
            snapshot_download(
                where, allow_patterns=list(MODEL_FILES), local_files_only=settings.offline
            )
        )


def _linear_shapes(model: nn.Module) -> Shapes:
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _locate(name: str, settings: Settings) -> str:
    """What transformers shall load: a folder, or the name itself where the Hub has to be asked."""
    short = canonical_base_name(name) != name  # means the embedded model, whatever lies about here
    if not short and Path(name).is_dir():
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
def _explained(name: str, part: str = "") -> Iterator[None]:
    """Turns transformers' ways of saying that a model cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if same_base_model(name, EMBEDDED_ID) and find_gguf() is None:
            raise missing_model_error() from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{part}the base model {name!r} cannot be loaded: {reason.rstrip(' :')}",
            "give a local folder, a Hub id that this machine can reach, or smollm2",
        ) from error


def _check_complete(name: str, missing: Sequence[str]) -> None:
    """Transformers fills weights that it does not find with random numbers.

    Raises:
        InputError: there are such.
    """
    if missing:
        raise InputError(
            f"the base model {name!r} lacks {len(missing)} weights, such as {min(missing)}",
            "download it again, or name another copy",
        )


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
