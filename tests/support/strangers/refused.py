"""Strangers whose configuration, or whose place on the Hub, keeps them out."""

import json
from typing import Any

from support.strangers.draft import CONFIG, WEIGHTS, Draft
from support.strangers.kinds import (
    PICKLE,
    REDOS,
    Change,
    Kind,
    adapts,
    has,
    is_,
    kind,
    lacks,
    sets,
)

# --- configurations that are none -----------------------------------------------------------

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 808\n" % (b"0" * 64)


def _in_utf16(draft: Draft) -> None:
    draft.files[CONFIG] = json.dumps(draft.config).encode("utf-16")


UNREADABLE = (
    kind("configuration empty", "bad_config", has(CONFIG, b"")),
    kind("configuration a pointer to the storage", "bad_config", has(CONFIG, LFS_POINTER)),
    kind("configuration a page of HTML", "bad_config", has(CONFIG, b"<html></html>")),
    kind("configuration a list", "bad_config", has(CONFIG, b"[]")),
    kind("configuration in UTF-16", "bad_config", _in_utf16),
    kind("configuration nested deeply", "bad_config", has(CONFIG, b'{"r":' + b"[" * 50_000)),
    kind("configuration of a megabyte", "config_too_large", has(CONFIG, b" " * 1_000_001)),
)


# --- other methods and other tasks ----------------------------------------------------------

ANOTHER_TRAINER = json.dumps(
    {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
        "model": "mlx_model",
        "num_layers": 16,
    }
).encode()
OTHER_METHODS = ("ADALORA", "BOFT", "IA3", "LOHA", "LOKR", "LN_TUNING", "OFT", "VERA", "XLORA")
OTHER_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")

METHODS_AND_TASKS = (
    *(
        kind(f"method {name.lower()}", "not_lora", sets(peft_type=name))
        for name in (*OTHER_METHODS, *OTHER_PROMPTS)
    ),
    kind("method unknown", "not_lora", sets(peft_type="NOPE")),
    kind("method in lower case", "not_lora", sets(peft_type="lora")),
    kind("method a number", "not_lora", sets(peft_type=1)),
    kind("method null", "not_lora", sets(peft_type=None)),
    kind("method missing", "not_lora", lacks("peft_type")),
    kind("configuration of another trainer", "not_lora", has(CONFIG, ANOTHER_TRAINER)),
    kind("configuration of a base alone", "not_lora", has(CONFIG, b'{"base_model": "x/y"}')),
    *(kind(f"task {name.lower()}", "not_causal_lm", sets(task_type=name)) for name in OTHER_TASKS),
    kind("task of no name", "not_causal_lm", sets(task_type="")),
)


# --- features that no low-rank update has ---------------------------------------------------

FEATURES = (
    kind("weight-decomposed", "dora", sets(use_dora=True)),
    kind("all biases trained", "bias", sets(bias="all")),
    kind("biases of the adapted trained", "bias", sets(bias="lora_only")),
    kind("a bias on B", "lora_bias", sets(lora_bias=True)),
    kind("a head saved", "modules_to_save", sets(modules_to_save=["lm_head", "embed_tokens"])),
    kind("a slow pattern saved", "modules_to_save", sets(modules_to_save=[REDOS])),
    kind("token rows trained", "token_rows", sets(trainable_token_indices=[1_000_000_000])),
    kind("token rows by name", "token_rows", sets(trainable_token_indices={"embed_tokens": [0]})),
    kind("layers repeated", "layer_replication", sets(layer_replication=[[0, 2]] * 200)),
    kind("parameters as targets", "target_parameters", sets(target_parameters=["mlp.experts.w"])),
    *(
        kind(f"initialised by {name}", "init_alters_base", sets(init_lora_weights=name))
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of")
    ),
    kind("base quantised anew", "loftq", sets(loftq_config={"loftq_bits": 4})),
    kind("a cache file to load", "corda", sets(corda_config={"cache_file": "/tmp/cache.pt"})),
    kind("a covariance file to load", "corda", sets(corda_config={"covariance_file": "../cov.pt"})),
    kind("gradients for a start", "lora_ga", sets(lora_ga_config={"direction": "ArB2r"})),
    kind(
        "a module to import",
        "megatron",
        sets(megatron_core="antigravity", megatron_config={"hidden_size": 1}),
    ),
    kind("activated by tokens", "alora", sets(alora_invocation_tokens=[1, 2])),
    kind("routed", "arrow", sets(arrow_config={"top_k": 2})),
    kind("knowledge-aware", "kasa", sets(kasa_config={"beta": 1.0})),
    kind("pooled by group", "qalora", sets(use_qalora=True, qalora_group_size=16)),
    kind("block-diagonal", "bdlora", sets(use_bdlora={"nblocks": 2})),
    kind("inputs compressed", "velora", sets(velora_config={"groups": 4})),
    kind("factors sampled", "monteclora", sets(monteclora_config={"samples": 4})),
)


# --- fields of wrong types ------------------------------------------------------------------


def _saying_rank(value: Any) -> Change:
    """States this rank, whatever the tensors have."""
    return sets(r=value)


VALUES = (
    *(
        kind(f"rank {words}", "bad_config", _saying_rank(value))
        for words, value in {
            "as text": "8",
            "a fraction": 8.5,
            "a whole float": 8.0,
            "negative": -1,
            "zero": 0,
            "null": None,
            "true": True,
            "in a list": [8],
            "of 2 to the 28": 2**28,
            "beyond all bounds": 10**400,
        }.items()
    ),
    kind("rank missing", "bad_config", lacks("r")),
    kind("rank unlike the tensors'", "rank_mismatch", adapts("q_proj", rank=4), _saying_rank(512)),
    kind(
        "rank pattern unlike the tensors'",
        "rank_mismatch",
        adapts("q_proj", rank=4),
        sets(rank_pattern={"q_proj": 8}),
    ),
    kind("alpha as text", "bad_config", sets(lora_alpha="16")),
    kind("alpha null", "bad_config", sets(lora_alpha=None)),
    kind("alpha not a number", "bad_config", sets(lora_alpha=float("nan"))),
    kind("alpha infinite", "bad_config", sets(lora_alpha=float("inf"))),
    kind("alpha beyond all bounds", "bad_config", sets(lora_alpha=10**400)),
    kind("alpha zero", "no_effect", sets(lora_alpha=0)),
    kind("alpha immense", "norm_out_of_range", sets(lora_alpha=1e9)),
    kind("alpha whose square overflows", "norm_out_of_range", sets(lora_alpha=1e300)),
    kind("scale flag as text", "bad_config", sets(use_rslora="true")),
    kind("rank pattern a list", "bad_config", sets(rank_pattern=[["q_proj", 4]])),
    kind("rank pattern of text", "bad_config", sets(rank_pattern={"q_proj": "4"})),
    kind("alpha pattern of text", "bad_config", sets(alpha_pattern={"q_proj": "4"})),
    kind("slow pattern in rank_pattern", "pattern_regex", sets(rank_pattern={REDOS: 4})),
    kind("slow pattern in alpha_pattern", "pattern_regex", sets(alpha_pattern={REDOS: 4})),
    kind("pattern by layer number", "pattern_regex", sets(rank_pattern={r"layers\.0\.": 4})),
    kind(
        "factors for what is no target",
        "untargeted",
        adapts("q_proj", "v_proj"),
        sets(target_modules=["q_proj"]),
    ),
    kind(
        "factors for what is excluded",
        "untargeted",
        adapts("q_proj", "v_proj"),
        sets(exclude_modules=["v_proj"]),
    ),
    kind("targets a number", "bad_config", sets(target_modules=3)),
    kind("targets an object", "bad_config", sets(target_modules={"q_proj": True})),
    kind("targets not all names", "bad_config", sets(target_modules=["q_proj", None])),
    kind("base a number", "bad_config", sets(base_model_name_or_path=8)),
    kind("base a list", "bad_config", sets(base_model_name_or_path=["a/b"])),
)


# --- other base models ----------------------------------------------------------------------


def _stating(form: str) -> Change:
    """Names another base model, made of this one's name."""

    def change(draft: Draft) -> None:
        owner, _, name = draft.base_model.partition("/")
        draft.config["base_model_name_or_path"] = form.format(owner=owner, name=name)

    return change


def _for_wider_layers(draft: Draft) -> None:
    draft.shapes = {module: (2 * rows, 2 * cols) for module, (rows, cols) in draft.shapes.items()}


def _for_more_layers(draft: Draft) -> None:
    more = {m.replace(".layers.1.", ".layers.7."): shape for m, shape in draft.shapes.items()}
    draft.shapes |= more
    draft.adapt("q_proj", "v_proj")


def _for_another_architecture(*modules: str) -> Change:
    def change(draft: Draft) -> None:
        draft.shapes = dict.fromkeys(modules, (96, 32))
        draft.adapt(*{module.rpartition(".")[2] for module in modules})

    return change


NAMELESS = (sets(base_model_name_or_path=None), is_(card_base=None))
"""Neither the configuration nor the card names a base model, so no listing finds it."""


BASES = (
    kind("base of another owner", "wrong_base", _stating("stranger/{name}")),
    kind("base without an owner", "wrong_base", _stating("{name}")),
    kind("base with a longer name", "wrong_base", _stating("{owner}/{name}-Chat")),
    kind("base a copy of a longer name", "wrong_base", _stating("unsloth/{name}-Chat-bnb-4bit")),
    kind("base unrelated", "wrong_base", sets(base_model_name_or_path="gpt2")),
    kind("wider than the base", "shape_mismatch", _for_wider_layers),
    kind("more layers than the base", "no_such_module", _for_more_layers),
    kind(
        "modules of another architecture",
        "no_such_module",
        _for_another_architecture("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"),
        sets(fan_in_fan_out=True),
    ),
    kind(
        "modules with one projection",
        "no_such_module",
        _for_another_architecture("model.layers.0.self_attn.query_key_value"),
    ),
    kind(
        "modules of a vision tower",
        "no_such_module",
        _for_another_architecture("vision_tower.blocks.0.attn.qkv"),
    ),
    kind("no base and other shapes", "unknown_base", *NAMELESS, _for_wider_layers),
    kind("no base and other layers", "unknown_base", *NAMELESS, _for_more_layers),
)


# --- what only the Hub can tell -------------------------------------------------------------


def _only_checkpoints(draft: Draft) -> None:
    """Nothing at the root: the trainer's checkpoints are all there is."""
    config = json.dumps(draft.config).encode()
    draft.files = {CONFIG: None, WEIGHTS: None, f"checkpoint-10/{CONFIG}": config}
    draft.files[f"checkpoint-10/{WEIGHTS}"] = b"\0" * 64


ON_THE_HUB = (
    kind("gated by a form", "gated", is_(gated="auto")),
    kind("gated by its owner", "gated", is_(gated="manual")),
    kind("disabled", "disabled", is_(disabled=True)),
    kind("private", "not_found", is_(private=True)),
    kind("no configuration", "no_config", has(CONFIG, None)),
    kind("a card and nothing else", "no_config", has(CONFIG, None), has(WEIGHTS, None)),
    kind("checkpoints and nothing else", "no_config", _only_checkpoints),
    kind(
        "a LoRA of a picture model",
        "no_config",
        has(CONFIG, None),
        has(WEIGHTS, None),
        has("pytorch_lora_weights.safetensors", b"\0" * 64),
        is_(library="diffusers"),
    ),
    kind(
        "its only files lead elsewhere",
        "no_config",
        has(CONFIG, None),
        has(WEIGHTS, None),
        has(f"../{CONFIG}", b"{}"),
        has(f"../{WEIGHTS}", b"\0" * 64),
    ),
    kind("no weights", "no_safetensors", has(WEIGHTS, None)),
    kind("a pickle", "no_safetensors", has(WEIGHTS, None), has("adapter_model.bin", PICKLE)),
    kind("another format", "no_safetensors", has(WEIGHTS, None), has("adapters.npz", b"PK")),
    kind(
        "weights in parts",
        "no_safetensors",
        has(WEIGHTS, None),
        has("adapter_model-00001-of-00002.safetensors", b"\0" * 64),
    ),
)

REFUSED: tuple[Kind, ...] = (
    *UNREADABLE,
    *METHODS_AND_TASKS,
    *FEATURES,
    *VALUES,
    *BASES,
    *ON_THE_HUB,
)
