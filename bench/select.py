"""Ways to rank a pool for a task, beside the straightforward way and beside dense products.

Adapters are random: of rank 16 in every linear module of the embedded model, or at the shapes of
one Llama-3.1-8B layer. What is compared runs in the same process.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from bench.merge import LARGE_BLOCK
from bench.timing import Comparison, Measured, compare, measure
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import encode_examples, prompt_text
from recycle_cli.engine.gradients import factor_dtype, weight_gradients
from recycle_cli.evaluation.lm_eval_task import lm_eval_config, run_lm_eval
from recycle_cli.evaluation.tasks import Row, load_task
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.selection.first_order import slopes
from recycle_cli.selection.halving import rounds
from recycle_cli.selection.similarity import Target, similarity
from recycle_cli.settings import read_settings
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.demo import examples_folder

ADAPTERS, ROWS, MANY_ROWS, LARGE_POOL, K = 24, 24, 80, 200, 5
EVALUATED, DENSE, AT_8B, DISTINCT = 3, 3, 1000, 50


def comparisons() -> Iterator[Comparison]:
    """Evaluation beside PEFT and lm-eval; gradient and halving beside evaluation; cosine."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    train = load_task(str(examples_folder() / "tasks/hotel_reviews")).train
    # In float32, where batches of other sizes give the same answers.
    exact = replace(read_settings(), dtype="float32")
    one, two = (load_base_model(EMBEDDED_NAME, exact) for _ in range(2))
    yield _evaluation(one, two, train[:ROWS])
    yield _gradient(base, train[:MANY_ROWS])
    yield _halving(base, train[:MANY_ROWS])
    yield _cosine()


def _evaluation(base: BaseModel, other: BaseModel, rows: Sequence[Row]) -> Comparison:
    """The same adapters, rows and model, and the same answers in the end."""
    ours: list[float] = []
    theirs: list[float] = []
    shapes = {path: shape for path, shape in base.shapes.items() if path != "lm_head"}
    with TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(ADAPTERS)]
        for folder in folders:
            folder.mkdir()
            write_adapter(folder, _update(shapes, folder.name), base.id)
        first: Any = PeftModel.from_pretrained(other.model, folders[0], adapter_name="none")
        config = lm_eval_config("bench", [prompt_text(base, r.input) for r in rows], rows, "acc")

        def evaluate() -> None:
            ours[:] = [
                sum(answer_rows(base, read_adapter(folder).update, rows, "acc", Silent()).correct)
                for folder in folders
            ]

        def one_by_one() -> None:
            theirs.clear()
            for folder in folders:
                first.load_adapter(folder, adapter_name="one")
                first.set_adapter("one")
                samples = run_lm_eval(first, other.tokenizer, config, 32).samples
                theirs.append(sum(sample.scores["acc_norm"] for sample in samples))
                first.delete_adapter("one")

        found = compare(
            f"evaluation: {ADAPTERS} adapters, {ROWS} rows, float32",
            evaluate,
            "load by PEFT, lm-eval, unload, one by one",
            one_by_one,
            turns=2,
            warm_up=0,
        )
    if ours != theirs:
        raise RuntimeError(f"the scores differ: {ours}, {theirs}")
    return found


def _gradient(base: BaseModel, rows: Sequence[Row]) -> Comparison:
    """A pool of 200: one gradient, beside evaluations of which a few are run. Neither reads files,
    which takes the same for both."""
    shapes = {path: shape for path, shape in base.shapes.items() if path != "lm_head"}
    few = [_update(shapes, f"few{number}") for number in range(8)]
    pool = [few[number % len(few)] for number in range(LARGE_POOL)]

    def gradient() -> None:
        gradients = weight_gradients(base, encode_examples(base, rows), list(shapes))
        slopes(gradients, pool, factor_dtype(base))

    def evaluation() -> None:
        for update in few[:EVALUATED]:
            answer_rows(base, update, rows, "acc", Silent())

    found = compare("", gradient, "", evaluation, turns=3)
    whole = [_times(one, LARGE_POOL / EVALUATED) for one in found.theirs]
    return Comparison(
        f"gradient: {LARGE_POOL} adapters in memory, {len(rows)} rows",
        found.ours,
        f"evaluation, {EVALUATED} adapters measured, times {LARGE_POOL / EVALUATED:.0f}",
        tuple(whole),
    )


def _halving(base: BaseModel, rows: Sequence[Row]) -> Comparison:
    shapes = {path: shape for path, shape in base.shapes.items() if path != "lm_head"}
    pool = [_update(shapes, f"half{number}") for number in range(ADAPTERS)]

    def halving() -> None:
        seen, left = 0, pool
        for count, upto in rounds(len(pool), len(rows), K):
            left = left[:count]
            for update in left:
                answer_rows(base, update, rows[seen:upto], "acc", Silent())
            seen = upto

    def evaluation() -> None:
        for update in pool:
            answer_rows(base, update, rows, "acc", Silent())

    what = f"halving to {K}: {ADAPTERS} adapters, {len(rows)} rows"
    return compare(what, halving, "evaluation", evaluation, turns=1, warm_up=0)


def _cosine() -> Comparison:
    """The cheapest measure of a thousand adapters, beside dense products of a few."""
    pool = [_update(LARGE_BLOCK, f"8b{number}") for number in range(DISTINCT)]
    target = _update(LARGE_BLOCK, "target", rank=64)
    prepared = Target(target)

    def ours() -> None:
        for number in range(AT_8B):
            similarity(pool[number % DISTINCT], prepared, "cosine")

    def dense() -> None:
        for update in pool[:DENSE]:
            _dense_cosine(update, target)

    found = [measure(ours) for _ in range(2)]
    theirs = [_times(measure(dense), AT_8B / DENSE) for _ in range(2)]
    return Comparison(
        f"cosine: {AT_8B:,} adapters, one Llama-3.1-8B layer",
        found,
        f"dense products, float32, {DENSE} adapters measured, times {AT_8B / DENSE:.0f}",
        tuple(theirs),
    )


def _dense_cosine(update: ModelUpdate, target: ModelUpdate) -> float:
    sums = torch.zeros(3)
    for module, piece in update.items():
        c, t = piece.dense(), target[module].dense()
        sums += torch.stack([_sum(c, t), _sum(c, c), _sum(t, t)])
    return float(sums[0] / math.sqrt(float(sums[1] * sums[2]) + 1e-6))


def _sum(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum()


def _times(one: Measured, factor: float) -> Measured:
    return Measured(one.seconds * factor, one.extra_bytes)


def _update(shapes: Any, name: str, rank: int = 16) -> dict[str, LowRankUpdate]:
    found = {}
    for module, (out, wide) in shapes.items():
        generator = generator_for("bench select", f"{name}.{module}")
        a = torch.randn(rank, wide, generator=generator) / math.sqrt(wide)
        found[module] = LowRankUpdate(a, 0.02 * torch.randn(out, rank, generator=generator), 2.0)
    return found
