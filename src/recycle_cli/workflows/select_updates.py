"""Scoring adapters by their updates: with one gradient of the base model, or with a target LoRA."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress
from recycle_cli.records import LeftOut
from recycle_cli.selection.catalog import NORMALISED
from recycle_cli.selection.ranking import Score
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.select_outcome import Outcome
from recycle_cli.workflows.select_request import SelectRequest

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.lora.update import ModelUpdate

Shapes = Mapping[str, tuple[int, int]]
"""Module path -> (out, in)."""
ShapesOf = Mapping[str, Shapes]
"""The same for each of several adapters, by sha256."""
Scoring = Callable[[Sequence["ModelUpdate"]], list[float]]
OPEN_AT_ONCE = 128
"""Adapters whose files are open at the same time."""


def usable(base_model: str, pool: Sequence[Source]) -> tuple[ShapesOf, list[LeftOut]]:
    """The shapes of the adapters that can be opened, and the others, with the reason."""
    shapes, left_out = {}, []
    for source in pool:
        try:
            shapes[source.ref.sha256] = source.shapes(base_model)
        except RecycleError as error:
            left_out.append(LeftOut(id=source.ref.id, reason=error.message))
    return shapes, left_out


def by_gradient(
    request: SelectRequest,
    pool: Sequence[Source],
    shapes: ShapesOf,
    base: "BaseModel",
    progress: Progress,
) -> Outcome:
    """One pass of the base model, then the products of its gradients with every update."""
    from recycle_cli.engine.encoding import encode_examples
    from recycle_cli.engine.gradients import factor_dtype, weight_gradients
    from recycle_cli.lora.norm import module_norms, total_norm
    from recycle_cli.selection.first_order import slopes

    rows, there = request.rows_to_score(), base.shapes

    def misfit(module: str, shape: tuple[int, int]) -> str | None:
        where = f"{request.base_model}, or has another shape there"
        return None if there.get(module) == shape else f"{module} is not in {where}"

    fitting, left_out = _fitting(pool, shapes, misfit)
    if not fitting:
        return Outcome([], left_out)
    modules = {module for source in fitting for module in shapes[source.ref.sha256]}
    progress.stage("one gradient of the base model")
    gradients = weight_gradients(base, encode_examples(base, rows), sorted(modules), progress)
    normalise = request.method == NORMALISED
    precision = factor_dtype(base)

    def score(updates: "Sequence[ModelUpdate]") -> list[float]:
        found = [-slope for slope in slopes(gradients, updates, precision)]
        if not normalise:
            return found
        norms = [total_norm(module_norms(update)) for update in updates]
        return [one / norm if norm else 0.0 for one, norm in zip(found, norms, strict=True)]

    scores, unread = _scored(request.base_model, fitting, score, progress)
    return Outcome(scores, [*left_out, *unread], passes=1, rows_scored=len(rows))


def by_target(
    request: SelectRequest, pool: Sequence[Source], shapes: ShapesOf, progress: Progress
) -> Outcome:
    """How like each update is to that of the target LoRA."""
    from recycle_cli.selection.similarity import Target, similarity

    assert request.target is not None
    update = request.target.load(request.base_model)
    target = Target(update)

    def misfit(module: str, shape: tuple[int, int]) -> str | None:
        same = module not in update or update[module].shape == shape
        return None if same else f"{module} has another shape in the target LoRA"

    def score(updates: "Sequence[ModelUpdate]") -> list[float]:
        return [similarity(one, target, request.method, request.aggregate) for one in updates]

    fitting, left_out = _fitting(pool, shapes, misfit)
    scores, unread = _scored(request.base_model, fitting, score, progress)
    return Outcome(scores, [*left_out, *unread])


def _fitting(
    pool: Sequence[Source],
    shapes: ShapesOf,
    misfit: Callable[[str, tuple[int, int]], str | None],
) -> tuple[list[Source], list[LeftOut]]:
    """The adapters of which all modules fit, and the others, with what is wrong with one."""
    fitting, left_out = [], []
    for source in pool:
        own = shapes[source.ref.sha256].items()
        wrong = next(filter(None, (misfit(*module) for module in own)), None)
        if wrong:
            left_out.append(LeftOut(id=source.ref.id, reason=wrong))
        else:
            fitting.append(source)
    return fitting, left_out


def _scored(
    base_model: str, pool: Sequence[Source], score: Scoring, progress: Progress
) -> tuple[list[Score], list[LeftOut]]:
    """Scores from updates, some adapters at a time; and those that turn out to have none."""
    progress.stage(f"comparing {len(pool)} adapters", len(pool))
    scores, left_out = [], []
    for start in range(0, len(pool), OPEN_AT_ONCE):
        part = pool[start : start + OPEN_AT_ONCE]
        for source, found in zip(part, _values(base_model, part, score), strict=True):
            if isinstance(found, float) and math.isfinite(found):
                scores.append(Score(source.ref.sha256, found))
                progress.advance(f"{source.ref.id} {found:.4g}")
            else:
                reason = "its score is no number" if isinstance(found, float) else found.message
                left_out.append(LeftOut(id=source.ref.id, reason=reason))
                progress.advance(f"{source.ref.id} left out")
    return scores, left_out


def _values(
    base_model: str, part: Sequence[Source], score: Scoring
) -> Sequence[float | RecycleError]:
    """The score of each, or why there is none. Updates are read module by module, so what is wrong
    with one shows while all are scored; halves of them are then tried until it is alone."""
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(source.open(base_model)) for source in part]
            return score([one.update for one in opened])
    except RecycleError as error:
        if len(part) == 1:
            return [error]
        half = len(part) // 2
        return [
            value
            for some in (part[:half], part[half:])
            for value in _values(base_model, some, score)
        ]
