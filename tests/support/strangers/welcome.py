"""Strangers that belong in the pool, however odd their configuration looks."""

from typing import Any

import torch

from support.pico import ATTENTION, MLP
from support.strangers.draft import Draft, Tensors, name_of
from support.strangers.kinds import REDOS, Change, adapts, bends, is_, kind, lacks, sets

UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)


# --- ranks, scales and modules --------------------------------------------------------------


def _patterned(draft: Draft) -> None:
    """Ranks and alphas by the last names of modules."""
    draft.ranks = {m: 2 if name_of(m) == "v_proj" else rank for m, rank in draft.ranks.items()}
    draft.config |= {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4, "q_proj": 3}}


def _patterned_by_path(draft: Draft) -> None:
    """A rank of its own for one module of one layer."""
    module = min(draft.ranks)
    draft.ranks[module] = 1
    draft.config["rank_pattern"] = {module: 1}


def _one_layer_only(value: Any) -> Change:
    """Adapts the last layer and says so with `value`."""

    def change(draft: Draft) -> None:
        draft.ranks = {m: rank for m, rank in draft.ranks.items() if ".layers.1." in m}
        draft.config |= {"layers_to_transform": value, "layers_pattern": "layers"}

    return change


def _mixed_dtypes(tensors: Tensors) -> Tensors:
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return {
        key: tensor.to(kinds[place % 3])
        for place, (key, tensor) in enumerate(sorted(tensors.items()))
    }


RANKS_AND_MODULES = (
    kind("plain", "accepted"),
    kind("rank-stabilised scale", "accepted", sets(use_rslora=True)),
    kind("ranks and alphas by pattern", "accepted", adapts(*ATTENTION, rank=4), _patterned),
    kind("a rank by a whole path", "accepted", _patterned_by_path),
    kind("all-linear", "accepted", adapts(*ATTENTION, *MLP), sets(target_modules="all-linear")),
    kind(
        "targets as a regular expression",
        "accepted",
        adapts("q_proj", "v_proj"),
        sets(target_modules=r".*\.(q|v)_proj$"),
    ),
    kind(
        "targets as unsloth writes them",
        "accepted",
        adapts("q_proj", "v_proj"),
        sets(target_modules=UNSLOTH_TARGETS),
    ),
    kind("one target as text", "accepted", adapts("q_proj"), sets(target_modules="q_proj")),
    kind("target repeated", "accepted", adapts("q_proj"), sets(target_modules=["q_proj"] * 2)),
    kind("one module", "accepted", adapts("v_proj", rank=8)),
    kind("feed-forward only", "accepted", adapts(*MLP)),
    kind("one layer in a list", "accepted", _one_layer_only([1])),
    kind("one layer as a number", "accepted", _one_layer_only(1)),
    kind("rank 1", "accepted", adapts(*ATTENTION, *MLP, rank=1)),
    kind("rank 32", "accepted", adapts(*ATTENTION, rank=32)),
    kind("float16", "accepted", is_(dtype=torch.float16)),
    kind("bfloat16", "accepted", is_(dtype=torch.bfloat16)),
    kind("mixed dtypes", "accepted", bends(_mixed_dtypes)),
    kind("no metadata in the weights", "accepted", is_(metadata=None)),
    kind("alpha as a float", "accepted", sets(lora_alpha=16.0)),
    kind("alpha missing", "accepted", lacks("lora_alpha")),
)


# --- the name of the base model -------------------------------------------------------------


def _stating(form: str) -> Change:
    """Writes the base model's name in a form with `{owner}` and `{name}` in it."""

    def change(draft: Draft) -> None:
        draft.config["base_model_name_or_path"] = _in_form(form, draft.base_model)

    return change


def _card_naming(form: str) -> Change:
    """Names the base model in the card in this form."""

    def change(draft: Draft) -> None:
        draft.card_base = _in_form(form, draft.base_model)

    return change


def _in_form(form: str, base_model: str) -> str:
    owner, _, name = base_model.partition("/")
    return form.format(owner=owner, name=name, lower=name.lower(), upper=name.upper())


BASE_NAMES = (
    kind("base in lower case", "accepted", _stating("{owner}/{lower}")),
    kind("base in upper case", "accepted", _stating("{owner}/{upper}")),
    kind("base with a slash behind", "accepted", _stating("{owner}/{name}/")),
    kind("base a copy by unsloth", "accepted", _stating("unsloth/{name}")),
    kind("base a 4-bit copy", "accepted", _stating("unsloth/{lower}-bnb-4bit")),
    kind("base a dynamic 4-bit copy", "accepted", _stating("unsloth/{name}-unsloth-bnb-4bit")),
    kind(
        "base and card a 4-bit copy",
        "accepted",
        _stating("unsloth/{name}-bnb-4bit"),
        _card_naming("unsloth/{name}-bnb-4bit"),
    ),
    kind("base a folder on a rented machine", "accepted", _stating("/root/models/{name}")),
    kind("base a folder nearby", "accepted", _stating("../{lower}-hf")),
    kind("base a folder on Windows", "accepted", _stating("C:\\models\\{name}")),
    kind(
        "base a snapshot in a cache",
        "accepted",
        _stating("/content/models--{owner}--{name}/snapshots/" + "8c" * 20),
    ),
    kind("base a file of the system", "accepted", sets(base_model_name_or_path="/etc/passwd")),
    kind("base null", "accepted", sets(base_model_name_or_path=None)),
    kind("base empty", "accepted", sets(base_model_name_or_path="")),
    kind("base missing", "accepted", lacks("base_model_name_or_path")),
    kind("base of a branch", "accepted", sets(revision="unsloth")),
)


# --- fields that must not matter ------------------------------------------------------------


def _minimal(draft: Draft) -> None:
    needed = "peft_type", "r", "lora_alpha", "base_model_name_or_path"
    draft.config = {name: draft.config[name] for name in needed}


FIELDS = (
    kind("task type null", "accepted", sets(task_type=None)),
    kind("task type missing", "accepted", lacks("task_type")),
    kind("fan_in_fan_out on linear layers", "accepted", sets(fan_in_fan_out=True)),
    kind("fan_in_fan_out null", "accepted", sets(fan_in_fan_out=None)),
    kind("initialised as gaussian", "accepted", sets(init_lora_weights="gaussian")),
    kind("initialised as orthogonal", "accepted", sets(init_lora_weights="orthogonal")),
    kind(
        "initialised by eva",
        "accepted",
        sets(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99}),
    ),
    kind("initialised at random", "accepted", sets(init_lora_weights=False)),
    kind("still in training mode", "accepted", sets(inference_mode=False)),
    kind("dropout of 0.15", "accepted", sets(lora_dropout=0.15)),
    kind("slow pattern in target_modules", "accepted", sets(target_modules=REDOS)),
    kind("slow pattern in exclude_modules", "accepted", sets(exclude_modules=REDOS)),
    kind(
        "slow pattern in layers_pattern",
        "accepted",
        sets(layers_pattern=[REDOS], layers_to_transform=[0, 1]),
    ),
    kind(
        "auto_mapping to the os module",
        "accepted",
        sets(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    ),
    kind(
        "auto_mapping of unsloth",
        "accepted",
        sets(
            auto_mapping={
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            }
        ),
    ),
    kind("another megatron_core", "accepted", sets(megatron_core="antigravity")),
    kind("runtime_config", "accepted", sets(runtime_config={"ephemeral_gpu_offload": True})),
    kind(
        "fields of another age",
        "accepted",
        sets(enable_lora=[True, False, True], merge_weights=False),
    ),
    kind(
        "fields of another trainer",
        "accepted",
        sets(peft_version="9.9.9", iters=700, optimizer={"adam": {}}, model="mlx_model"),
    ),
    kind(
        "features named and off",
        "accepted",
        sets(
            alora_invocation_tokens=None, arrow_config=None, use_qalora=False, qalora_group_size=16
        ),
    ),
    kind("no field but what is needed", "accepted", _minimal),
)
