"""An adapter repository in the making: a plain good one, and the means to change it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from support.hub import Repository
from support.hub.repository import Gated
from support.pico import ATTENTION, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, LAYERS, MLP

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
SPREAD = 0.25
MODULE_SETS = ((*ATTENTION, *MLP), ATTENTION, ("q_proj", "v_proj"), MLP)
HOW_OFTEN = (80, 8, 8, 4)
LICENSES = ("apache-2.0", "mit", "llama3.1", "cc-by-nc-4.0", None)
Tensors = dict[str, Tensor]


def base_shapes() -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every linear module in the layers of the pico model."""
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    attention = dict.fromkeys(ATTENTION, (HIDDEN, HIDDEN))
    attention |= dict.fromkeys(("k_proj", "v_proj"), (key_value, HIDDEN))
    mlp = dict.fromkeys(MLP, (INTERMEDIATE, HIDDEN)) | {"down_proj": (HIDDEN, INTERMEDIATE)}
    return {
        f"model.layers.{layer}.{block}.{name}": shape
        for layer in range(LAYERS)
        for block, modules in (("self_attn", attention), ("mlp", mlp))
        for name, shape in modules.items()
    }


def name_of(module: str) -> str:
    """The last part of a module path, as in `q_proj`."""
    return module.rpartition(".")[2]


@dataclass
class Draft:
    """What will be one repository. It starts as a good adapter of random rank and modules.

    Args:
        base_model: the Hub id of the base model.
        random: where everything that is drawn comes from.
        config: the fields of `adapter_config.json`.
        shapes: module path -> (out, in) of what the adapter is for.
        ranks: module path -> rank of its factors.
        dtype: of the factors.
        bends: what happens to the tensors before they are saved, in order.
        metadata: of the safetensors file.
        license: what the card and the tags say; None for nothing.
        card_base: the base model that the card names, and so the tags; None for none.
        files: files beside those made from the fields above, and in their place where the names
            are the same; None takes one away.
        older: earlier commits, oldest first, as changes of the files on main.
        gated, private, disabled, library: as the Hub has it.
    """

    base_model: str
    random: Random
    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=base_shapes)
    ranks: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bends: list[Callable[[Tensors], Tensors]] = field(default_factory=list)
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    license: str | None = None
    card_base: str | None = None
    files: dict[str, bytes | None] = field(default_factory=dict)
    older: list[Mapping[str, bytes]] = field(default_factory=list)
    gated: Gated = False
    private: bool = False
    disabled: bool = False
    library: str | None = "peft"

    def __post_init__(self) -> None:
        self.license = self.random.choice(LICENSES)
        self.card_base = self.base_model
        (modules,) = self.random.choices(MODULE_SETS, HOW_OFTEN)
        rank = self.random.choice((2, 4, 8, 16))
        self.config = _usual_config(self.base_model, rank, rank * self.random.choice((1, 2)))
        self.adapt(*modules)

    def adapt(self, *names: str) -> None:
        """Adapts the modules of these names in every layer, at the configuration's rank."""
        rank = self.config["r"]
        self.ranks = {module: rank for module in self.shapes if name_of(module) in names}
        # PEFT keeps a set, whose order differs from run to run.
        self.config["target_modules"] = self.random.sample(names, len(names))

    def tensors(self) -> Tensors:
        """The factors, drawn and bent."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        drawn: Tensors = {}
        for module, rank in self.ranks.items():
            rows, columns = self.shapes[module]
            prefix = f"base_model.model.{module}"
            for key, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                factor = SPREAD * torch.randn(shape, generator=generator)
                drawn[f"{prefix}.lora_{key}.weight"] = factor.to(self.dtype)
        for bend in self.bends:
            drawn = bend(drawn)
        return drawn

    def card(self) -> str:
        """The model card."""
        fields = [f"library_name: {self.library}"]
        fields += [f"base_model: {self.card_base}"] * (self.card_base is not None)
        fields += [f"license: {self.license}"] * (self.license is not None)
        return "\n".join(["---", *fields, "---", "# A LoRA", "", "Trained for fun.", ""])

    def finish(self, repo_id: str, created_at: str) -> Repository:
        """The repository."""
        files: dict[str, bytes | None] = {
            ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
            CARD: self.card().encode(),
            CONFIG: json.dumps(self.config, indent=2).encode(),
        }
        if WEIGHTS not in self.files:
            files[WEIGHTS] = save(self.tensors(), self.metadata)
        newest = {name: data for name, data in (files | self.files).items() if data is not None}
        commits = [newest | dict(changes) for changes in self.older] + [newest]
        repository = Repository(
            repo_id,
            commits[0],
            tags=self._tags(),
            library_name=self.library,
            gated=self.gated,
            private=self.private,
            disabled=self.disabled,
            downloads=int(10 ** self.random.uniform(0, 4)),
            likes=self.random.randint(0, 20),
            created_at=created_at,
            last_modified=created_at,
        )
        for files_then in commits[1:]:
            repository.commit(files_then)
        for age, sha in enumerate(list(repository.commits)[:-1]):
            repository.branches[f"v{age}"] = sha
        return repository

    def _tags(self) -> tuple[str, ...]:
        tags = ["safetensors", "lora"]
        if self.library is not None:
            tags.append(self.library)
        if self.card_base is not None:
            tags += [f"base_model:{self.card_base}", f"base_model:adapter:{self.card_base}"]
        tags += [f"license:{self.license}"] * (self.license is not None)
        return (*tags, "region:us")


def _usual_config(base_model: str, rank: int, alpha: int) -> dict[str, Any]:
    """What PEFT writes, as far as it matters here."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    }
