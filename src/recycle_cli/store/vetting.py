"""Vetting: whether a stranger's adapter may enter the pool, as a list of checks.

A check is one function that passes or raises AdapterProblem with one of its reason codes. They
run from cheap to dear and stop at the first problem: the configuration alone, then the header
without any tensor, then the tensors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import names_copy_of, same_base_model
from recycle_cli.lora.config import AdapterConfig, AdapterProblem
from recycle_cli.lora.folder import check_pair, check_shapes
from recycle_cli.records import AdapterDocument, AdapterStatus, RankRange
from recycle_cli.store.evidence import Evidence
from recycle_cli.store.factors import Pair
from recycle_cli.store.holders import DUPLICATE, held_by
from recycle_cli.store.questions import QUESTIONS
from recycle_cli.store.text import clean_text

UNREADABLE = "unreadable"
MAX_NAMES = 100


@dataclass(frozen=True)
class VettingLimits:
    """What the user allows.

    Args:
        max_weights_bytes: the largest weights file.
        max_rank: the largest rank of any module, or None for no limit.
        licenses: the licences allowed, compared without case, or None for any and none. Of several
            that an adapter states, all have to be among them.
        min_norm: the Frobenius norm that the whole update must be above: below it an adapter does
            next to nothing. Zero updates never pass.
        max_norm: the largest. Beyond it an adapter drowns the base model and every other adapter.
            Both defaults are those of arXiv 2602.12323.
    """

    max_weights_bytes: int = 2_000_000_000
    max_rank: int | None = None
    licenses: frozenset[str] | None = None
    min_norm: float = 1.0
    max_norm: float = 1000.0


@dataclass(frozen=True)
class VettingRules:
    """What an adapter is held against.

    Args:
        base_model: the canonical name of the base model.
        base_shapes: the (out, in) of every linear module of the base model, by module path.
        limits: what the user allows.
        holder_of: the id of an accepted adapter with this weights sha256 under another id than
            the one given, or None: called with (sha256, id).
        also_bases: other names of the base model that the user vouches for.
    """

    base_model: str
    base_shapes: Mapping[str, tuple[int, int]]
    limits: VettingLimits
    holder_of: Callable[[str, str], str | None]
    also_bases: frozenset[str] = frozenset()

    def names_base(self, name: str) -> bool:
        """Whether a name is the base model's, or that of a copy of it."""
        return names_copy_of(name, self.base_model) or any(
            same_base_model(name, other) for other in self.also_bases
        )


@dataclass(frozen=True)
class Check:
    """One thing that is checked.

    Args:
        name: of the check.
        sentence: what it asks.
        codes: the reasons that it gives.
        run: raises AdapterProblem with one of them.
        tensors: whether it reads the tensors, and so the whole file.
    """

    name: str
    sentence: str
    codes: tuple[str, ...]
    run: Callable[[Evidence, VettingRules], None]
    tensors: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of vetting. `reason` is a code and `detail` a sentence, unless accepted."""

    status: AdapterStatus
    reason: str | None = None
    detail: str | None = None


def vet(evidence: Evidence, rules: VettingRules, tensors: bool = True) -> Verdict:
    """Runs the checks in order up to the first problem. Never raises for what the files hold.

    Args:
        evidence: the adapter.
        rules: what it is held against.
        tensors: whether to run the checks that read the tensors too.
    """
    try:
        for check in CHECKS:
            if tensors or not check.tensors:
                check.run(evidence, rules)
    except AdapterProblem as problem:
        return Verdict("rejected", problem.code, clean_text(problem.message))
    except (OSError, InputError) as error:
        return Verdict("failed", getattr(error, "code", UNREADABLE), clean_text(str(error)))
    return Verdict("accepted")


def unexpected(error: Exception) -> Verdict:
    """The outcome where vetting itself failed, over files that nobody thought of."""
    return Verdict("failed", UNREADABLE, clean_text(f"{type(error).__name__}: {error}"))


def describe(evidence: Evidence, verdict: Verdict, rules: VettingRules) -> AdapterDocument:
    """The document of a vetted adapter, with what the checks read on their way and no more.

    `path` is left to whoever keeps the adapter.
    """
    config: AdapterConfig | None = evidence.known("config")
    pairs: Mapping[str, Pair] | None = evidence.known("pairs")
    norm: float | None = evidence.known("norm")
    accepted = verdict.status == "accepted"
    stated = clean_text(config.base_model) if config and config.base_model else None
    return AdapterDocument(
        id=evidence.found.id,
        source=evidence.found.source,
        origin=evidence.found.origin,
        revision=evidence.found.revision,
        pool=rules.base_model,
        sha256=evidence.known("sha256"),
        status=verdict.status,
        reason=verdict.reason,
        detail=verdict.detail,
        base_model=rules.base_model if accepted else stated,
        rank=_rank_range(config, pairs),
        alpha=config.alpha if config else None,
        use_rslora=config.use_rslora if config else None,
        target_modules=_target_modules(config, pairs),
        license=evidence.card.license,
        size_bytes=evidence.known("size_bytes"),
        norm=norm if norm is not None and math.isfinite(norm) else None,
        fingerprint=evidence.fingerprint if accepted and evidence.known("norm") else None,
        **evidence.found.facts,
    )


def _rank_range(config: AdapterConfig | None, pairs: Mapping[str, Pair] | None) -> RankRange | None:
    """From the tensors; from the configuration where vetting ended before them."""
    if pairs is not None:
        ranks = [a.shape[0] for a, _ in pairs.values()]
    elif config is not None:
        ranks = [config.rank, *config.rank_pattern.values()]
    else:
        return None
    return RankRange(min=min(ranks), max=max(ranks))


def _target_modules(config: AdapterConfig | None, pairs: Mapping[str, Pair] | None) -> list[str]:
    """The last names of the adapted modules, as in `q_proj`."""
    if pairs is not None:
        names = sorted({module.rpartition(".")[2] for module in pairs})
    else:
        names = list(config.target_modules) if config is not None else []
    return [clean_text(name) for name in names[:MAX_NAMES]]


# --- the checks of the configuration and the card -------------------------------------------


def check_version(evidence: Evidence, rules: VettingRules) -> None:
    """Asks for the latest version of an adapter."""
    if evidence.found.newer is not None:
        raise AdapterProblem("superseded", f"{evidence.found.newer} is a later version of it")


def check_access(evidence: Evidence, rules: VettingRules) -> None:
    """Asks the place whether the adapter may be read at all."""
    evidence.check_access()


def check_config(evidence: Evidence, rules: VettingRules) -> None:
    """Parses the configuration, which refuses what is no plain low-rank update."""
    _ = evidence.config


def check_base_name(evidence: Evidence, rules: VettingRules) -> None:
    """Compares the base model's name; an adapter that names none is left to `check_modules`."""
    names = _stated_bases(evidence, rules)
    if names and not any(rules.names_base(name) for name in names):
        raise AdapterProblem(
            "wrong_base", f"it was trained on {', '.join(names)}, not on {rules.base_model}"
        )


def _stated_bases(evidence: Evidence, rules: VettingRules) -> tuple[str, ...]:
    """The base models that an adapter names: its configuration's word, else its card's.

    A path on its author's disk names nothing, unless it is the very path that is wanted.
    """
    stated = (evidence.config.base_model or "").strip()
    if stated and (rules.names_base(stated) or not _is_local_path(stated)):
        return (stated,)
    return tuple(name for name in evidence.card.base_models if not _is_local_path(name))


def _is_local_path(name: str) -> bool:
    """True for what cannot be a Hub id, which is `name` or `org/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.rstrip("/").count("/") > 1


def check_license(evidence: Evidence, rules: VettingRules) -> None:
    """Compares the card's licence with the licences allowed; where it states several, all have to
    be."""
    allowed = rules.limits.licenses
    if allowed is None:
        return
    stated = evidence.card.license
    names = {name.strip().casefold() for name in (stated or "").split(",")}
    if not names <= {name.casefold() for name in allowed}:
        raise AdapterProblem(
            "license_refused",
            f"its licence is {stated or 'not stated'}; allowed: {', '.join(sorted(allowed))}",
        )


# --- the checks of the weights file's size and header ---------------------------------------


def check_weights_size(evidence: Evidence, rules: VettingRules) -> None:
    """Asks for a safetensors file of an allowed size."""
    limit = rules.limits.max_weights_bytes
    if evidence.size_bytes > limit:
        raise AdapterProblem(
            "too_large", f"its weights take {evidence.size_bytes} bytes, more than {limit}"
        )


def check_header(evidence: Evidence, rules: VettingRules) -> None:
    """Parses the header."""
    _ = evidence.header


def check_pairs(evidence: Evidence, rules: VettingRules) -> None:
    """Pairs the factors and compares their shapes with each other."""
    for module, (a, b) in evidence.pairs.items():
        check_shapes(module, a.shape, b.shape)


def check_stated_ranks(evidence: Evidence, rules: VettingRules) -> None:
    """Compares the ranks with the configuration's.

    Only now, when the modules are those of the base model: a stranger may state 5000 ranks, each of
    which may have to be compared with each module, of which a stranger's file may have 10,000.
    """
    for module, (a, b) in evidence.pairs.items():
        check_pair(module, a.shape, b.shape, evidence.config)


def check_targets(evidence: Evidence, rules: VettingRules) -> None:
    """Looks for factors that PEFT would pass over."""
    for module in evidence.pairs:
        if evidence.config.leaves_out(module):
            raise AdapterProblem(
                "untargeted",
                f"it has factors for {clean_text(module)}, which its configuration leaves out",
            )


def check_rank(evidence: Evidence, rules: VettingRules) -> None:
    """Compares the largest rank with the one allowed."""
    largest = max(a.shape[0] for a, _ in evidence.pairs.values())
    if rules.limits.max_rank is not None and largest > rules.limits.max_rank:
        raise AdapterProblem(
            "rank_too_large", f"its largest rank is {largest}, more than {rules.limits.max_rank}"
        )


def check_modules(evidence: Evidence, rules: VettingRules) -> None:
    """Compares every module with the base model's; shapes decide for an adapter without a name."""
    try:
        for module, (a, b) in evidence.pairs.items():
            _check_module(module, (b.shape[0], a.shape[1]), rules)
    except AdapterProblem as problem:
        if _stated_bases(evidence, rules):
            raise
        raise AdapterProblem(
            "unknown_base", f"it names no base model, and {problem.message}"
        ) from problem


def _check_module(module: str, shape: tuple[int, int], rules: VettingRules) -> None:
    expected = rules.base_shapes.get(module)
    if expected is None:
        raise AdapterProblem("no_such_module", f"{rules.base_model} has no linear module {module}")
    if shape != expected:
        raise AdapterProblem(
            "shape_mismatch",
            f"{module} is {expected} in {rules.base_model}, the adapter is for {shape}",
        )


# --- the checks of the tensors --------------------------------------------------------------


def check_duplicate(evidence: Evidence, rules: VettingRules) -> None:
    """Looks for an accepted adapter with the same weights."""
    holder = rules.holder_of(evidence.sha256, evidence.found.id)
    if holder is not None:
        raise AdapterProblem(DUPLICATE, held_by(holder))


def check_finite(evidence: Evidence, rules: VettingRules) -> None:
    """Looks for NaN and infinity."""
    _ = evidence.modules


def check_norm(evidence: Evidence, rules: VettingRules) -> None:
    """Compares the update's Frobenius norm with the limits."""
    norm, limits = evidence.norm, rules.limits
    if norm == 0.0:
        raise AdapterProblem("no_effect", "its update is zero: it changes nothing")
    if not limits.min_norm < norm <= limits.max_norm:
        raise AdapterProblem(
            "norm_out_of_range",
            f"its update has norm {norm:.4g}, outside ({limits.min_norm:g}, {limits.max_norm:g}]",
        )


RUNS: Mapping[str, Callable[[Evidence, VettingRules], None]] = {
    "version": check_version,
    "access": check_access,
    "config": check_config,
    "base name": check_base_name,
    "licence": check_license,
    "weights size": check_weights_size,
    "header": check_header,
    "factors": check_pairs,
    "rank": check_rank,
    "modules": check_modules,
    "stated ranks": check_stated_ranks,
    "targets": check_targets,
    "duplicate": check_duplicate,
    "finite": check_finite,
    "norm": check_norm,
}
READING_TENSORS = ("finite", "norm")
CHECKS: tuple[Check, ...] = tuple(
    Check(one.name, one.sentence, one.codes, RUNS[one.name], one.name in READING_TENSORS)
    for one in QUESTIONS
)
