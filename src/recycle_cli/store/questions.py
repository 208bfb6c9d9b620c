"""What vetting asks of an adapter, in order, and the reasons that it gives: words alone, which load
nothing."""

from dataclasses import dataclass

from recycle_cli.lora.config import UNSUPPORTED
from recycle_cli.store.holders import DUPLICATE


@dataclass(frozen=True)
class Question:
    """One thing that is asked.

    Args:
        name: of the check that asks it.
        sentence: what holds where it passes.
        codes: the reasons that it gives.
    """

    name: str
    sentence: str
    codes: tuple[str, ...]


CONFIG_CODES = (
    "no_config",
    "link_outside",
    "config_too_large",
    "bad_config",
    "not_lora",
    "not_causal_lm",
    "pattern_regex",
    *(feature.code for feature in UNSUPPORTED.values()),
)

QUESTIONS: tuple[Question, ...] = (
    Question("version", "It is the latest of its checkpoints.", ("superseded",)),
    Question(
        "access",
        "Its repository is there, open, and lets you in.",
        ("not_found", "gated", "disabled"),
    ),
    Question(
        "config",
        "adapter_config.json is a LoRA for a causal language model and nothing beyond it.",
        CONFIG_CODES,
    ),
    Question(
        "base name",
        "It was trained on the base model asked for.",
        ("wrong_base",),
    ),
    Question("licence", "Its licence is one of those allowed.", ("license_refused",)),
    Question(
        "weights size",
        "Its weights are a safetensors file of an allowed size.",
        ("link_outside", "no_safetensors", "too_large"),
    ),
    Question(
        "header",
        "The file is laid out exactly as its header says, in a dtype that is read.",
        ("truncated", "header_too_large", "bad_header", "dtype"),
    ),
    Question(
        "factors",
        "It holds pairs of factors and nothing else.",
        ("no_tensors", "foreign_key", "base_layer", "pair_incomplete", "shape_mismatch"),
    ),
    Question("rank", "Its largest rank is allowed.", ("rank_too_large",)),
    Question(
        "modules",
        "Every module is a linear one of the base model, with the same shape.",
        ("no_such_module", "shape_mismatch", "unknown_base"),
    ),
    Question(
        "stated ranks",
        "Its factors have the ranks that its configuration states.",
        ("rank_mismatch",),
    ),
    Question(
        "targets",
        "Its configuration leaves out no module that it has factors for.",
        ("untargeted",),
    ),
    Question("duplicate", "No accepted adapter has the same weights.", (DUPLICATE,)),
    Question("finite", "Its weights are finite numbers.", ("non_finite",)),
    Question(
        "norm",
        "Its update is not zero, and not out of proportion.",
        ("no_effect", "norm_out_of_range"),
    ),
)


def codes_in_order() -> list[str]:
    """Every reason, in the order of the checks."""
    return [code for question in QUESTIONS for code in question.codes]
