"""A study's results made up: several tasks, seeds, arms and ks, failures, and hostile names.

The figures are drawn with a fixed seed and hang together only as far as a report shows them.
"""

import hashlib
import random
from collections.abc import Sequence

from recycle_cli.records import (
    ArmRole,
    ScoredAdapter,
    StudyArm,
    StudyCells,
    StudyCoefficients,
    StudyComparison,
    StudyDocument,
    StudyFailure,
    StudyMean,
    StudyResults,
    StudyRow,
    StudySelection,
    StudySource,
    StudyTask,
    Verdict,
)

HOSTILE_ADAPTER = 'evil/<script>alert("adapter")</script>'
HOSTILE_TASK = "<img src=x onerror=alert('task')> | $\\frac{1}$ & `tick`"
HOSTILE_ERROR = "</td><script>alert('error')</script>\nsecond line | **bold**"
TASKS = ("qasc", "strategy_qa", HOSTILE_TASK)
MCNEMAR = "exact McNemar, two-sided; percentile interval of the paired bootstrap"
FLIPS = "sign-flip test over rows, two-sided; percentile interval of the paired bootstrap"
QUALITY = {"base": 0.42, "target": 0.61, "rescaled": 0.615, "single": 0.5}


def study_results(
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = (0, 1),
    methods: Sequence[str] = ("recycle", "lorahub"),
    ks: Sequence[int] = (5, 10, 20),
    layers: int = 5,
) -> StudyResults:
    """All that a report can show, of the given extent."""
    chance = random.Random(7)
    arms = _arms(methods, ks)
    pool = [HOSTILE_ADAPTER, *(f"someone/llama-lora-number-{i}-of-many" for i in range(1, 24))]
    table = [_row(arm, task, seed, chance) for arm in arms for task in tasks for seed in seeds]
    means = [_mean(arm.name, table, len(tasks)) for arm in arms]
    study = StudyDocument(
        seed=0,
        versions={"recycle": "0.1.0", "torch": "2.9.1", "python": "3.11.7"},
        command=["recycle", "study", "--config", "my studies/<all>.yaml", "--out", "out"],
        elapsed_s=7391.4,
        peak_memory_bytes=3_400_000_000,
        path="out",
        name="smollm-mini",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        rows=100,
        verdict=Verdict(
            kind="regularisation",
            sentence="Recycling beats your own LoRA, but not measurably more than random adapters "
            "do: 63.8 % for recycle of recycled adapters with the target LoRA k=20 against 61.0 % "
            "for a LoRA trained on the same 100 examples (difference 2.8 points, 95 % interval "
            "0.4 to 5.7, adjusted p = 0.021, 600 test rows of these 3 tasks); recycle of random "
            "adapters with the target LoRA k=20 reached 63.2 % (difference 0.6 points, 95 % "
            "interval -2.9 to 4.0, adjusted p = 1.00).",
            figures={
                "rows": 600.0,
                "margin": 0.01,
                "adjusted_equivalence_p_value.recycle+target k=5.target": 0.0412,
                "adjusted_equivalence_p_value.recycle+target k=20.target": 0.83,
            },
            notes=[
                "This speaks of the adapters that were made here, on rows like those of these 3 "
                "tasks; other tasks and other random seeds may differ. To speak of those takes 6 "
                "tasks.",
                f"The pool holds an adapter that is close to a task: {HOSTILE_ADAPTER}.",
            ],
        ),
        adapter="out/cells/3f2a9c/adapter",
        tasks=[_task(name) for name in tasks],
        arms=arms,
        table=table,
        means=means,
        comparisons=_comparisons(arms, means, table, tasks, chance),
        selections=[_selection(task, seed, pool, chance) for task in tasks for seed in seeds],
        failures=[StudyFailure(method="lorahub k=20", task=tasks[-1], seed=1, error=HOSTILE_ERROR)],
        sources=[_source(name, number) for number, name in enumerate(pool)],
        settings={"name": "smollm-mini", "tasks": list(tasks), "k": list(ks), "margin": 0.01},
        cells=StudyCells(done=len(table) - 3, reused=3, failed=1),
    )
    return StudyResults(study=study, coefficients=_coefficients(tasks, pool, layers, chance))


def without_anything() -> StudyResults:
    """The least that a study can be."""
    study = StudyDocument(
        seed=0,
        versions={},
        command=["recycle", "study"],
        elapsed_s=1.0,
        peak_memory_bytes=0,
        path="out",
        base_model="base",
        rows=0,
        verdict=Verdict(kind="incomplete", sentence="No verdict.", figures={}),
        table=[],
        cells=StudyCells(done=0, reused=0, failed=0),
    )
    return StudyResults(study=study)


def sha_of(name: str) -> str:
    """A digest as that of a weights file."""
    return hashlib.sha256(name.encode()).hexdigest()


def _arms(methods: Sequence[str], ks: Sequence[int]) -> list[StudyArm]:
    arms = [
        StudyArm(name="base", label="the base model", role="base"),
        StudyArm(name="target", label="the target LoRA", role="target", method="lora"),
        StudyArm(
            name="rescaled-target",
            label="the target LoRA rescaled alone",
            role="rescaled",
            method="rescale",
            with_target=True,
        ),
        StudyArm(
            name="single",
            label="the adapter that the selection puts first, as it is",
            role="single",
            selection="evaluation",
            k=1,
        ),
    ]
    for method in methods:
        for with_target in (False, True):
            for k in ks:
                arms += _twins(method, with_target, k)
    return arms


def _twins(method: str, with_target: bool, k: int) -> list[StudyArm]:
    """A recycled arm and its control."""
    name = f"{method}{'+target' if with_target else ''} k={k}"
    beside = " with the target LoRA" if with_target else ""

    def arm(name: str, pool: str, role: ArmRole, control: str | None) -> StudyArm:
        return StudyArm(
            name=name,
            label=f"{method} of {pool} adapters{beside} k={k}",
            role=role,
            method=method,
            selection="evaluation",
            k=k,
            with_target=with_target,
            control=control,
        )

    return [
        arm(name, "recycled", "recycled", f"random {name}"),
        arm(f"random {name}", "random", "control", None),
    ]


def _task(name: str) -> StudyTask:
    return StudyTask(
        name=name,
        sha256=sha_of(name),
        path=f"tasks/{sha_of(name)[:6]}",
        metric="acc",
        train_rows=80,
        valid_rows=20,
        test_rows=200,
    )


def _row(arm: StudyArm, task: str, seed: int, chance: random.Random) -> StudyRow:
    quality = QUALITY.get(arm.role, 0.48 + 0.13 * arm.with_target + 0.0012 * (arm.k or 0))
    value = round(200 * (quality + chance.gauss(0, 0.02))) / 200
    mixed = arm.role in ("recycled", "control")
    return StudyRow(
        method=arm.name,
        task=task,
        seed=seed,
        metrics={"acc": value, "exact_match": max(0.0, value - 0.105)},
        interval=(value - 0.067, value + 0.064),
        p_value_against_target=chance.random(),
        path=f"out/cells/{sha_of(arm.name + task)[:8]}",
        elapsed_s=31.5 + 3 * (arm.k or 0) + chance.random(),
        scored_s=8.25 + chance.random(),
        valid_loss=1.5 - value,
        adapters=arm.k or 0,
        target_share=0.3 + 0.4 * chance.random() if mixed and arm.with_target else None,
        peak_memory_bytes=1_200_000_000 + 10_000_000 * (arm.k or 0),
    )


def _mean(name: str, table: Sequence[StudyRow], tasks: int) -> StudyMean:
    values = [row.metrics["acc"] for row in table if row.method == name]
    value = sum(values) / len(values)
    interval = (value - 0.041, value + 0.0385)
    return StudyMean(method=name, value=value, interval=interval, tasks=tasks, runs=len(values))


def _comparisons(
    arms: Sequence[StudyArm],
    means: Sequence[StudyMean],
    table: Sequence[StudyRow],
    tasks: Sequence[str],
    chance: random.Random,
) -> list[StudyComparison]:
    overall = {mean.method: mean.value for mean in means}
    pairs = [(arm.name, "target") for arm in arms if arm.name != "target"]
    pairs += [(arm.name, arm.control) for arm in arms if arm.control]
    pairs += [(arm.name, "rescaled-target") for arm in arms if arm.role == "recycled"]
    found = [_comparison(pair, overall, None, chance) for pair in pairs]
    for task in tasks:
        values = {row.method: row.metrics["acc"] for row in table if row.task == task}
        found += [_comparison(pair, values, task, chance) for pair in pairs]
    return found


def _comparison(
    pair: tuple[str, str], values: dict[str, float], task: str | None, chance: random.Random
) -> StudyComparison:
    difference = values[pair[0]] - values[pair[1]]
    width = 0.025 + 0.01 * chance.random() if task is None else 0.07
    p_value = min(1.0, 2.718 ** (-((difference / width * 2.2) ** 2)))
    return StudyComparison(
        method=pair[0],
        baseline=pair[1],
        metric="acc",
        difference=difference,
        interval=(difference - width, difference + width),
        p_value=p_value,
        adjusted_p_value=min(1.0, 3 * p_value),
        test=MCNEMAR if task else FLIPS,
        task=task,
    )


def _selection(task: str, seed: int, pool: Sequence[str], chance: random.Random) -> StudySelection:
    scores = sorted((round(chance.random() * 20) / 20 for _ in pool), reverse=True)
    adapters = [
        ScoredAdapter(
            id=name,
            revision="a1b2c3d4e5f6a7b8",
            sha256=sha_of(name),
            path=f"home/adapters/{sha_of(name)[:8]}",
            score=score,
            log_likelihood=-1.0 - score,
        )
        for name, score in zip(pool, scores, strict=True)
    ]
    return StudySelection(
        task=task, seed=seed, method="evaluation", adapters=adapters, passes=480, elapsed_s=95.0
    )


def _source(name: str, number: int) -> StudySource:
    licenses = ("apache-2.0", "mit", "cc-by-nc-4.0", None)
    revision = "a1b2c3d4e5f6a7b8c9d0" if number % 5 else None
    return StudySource(
        id=name,
        revision=revision,
        sha256=sha_of(name),
        license=licenses[number % 4],
        cells=24 - number,
    )


def _coefficients(
    tasks: Sequence[str], pool: Sequence[str], layers: int, chance: random.Random
) -> list[StudyCoefficients]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
    every = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(layers) for kind in kinds]
    return [
        StudyCoefficients(
            method=method,
            task=task,
            seed=0,
            groups=groups,
            adapters=[*pool[:10], "the target LoRA"],
            values=[
                [0.6 * chance.random() ** 2 for _ in range(10)] + [0.5 + 0.4 * chance.random()]
                for _ in groups
            ],
        )
        for method, groups in (("recycle+target k=10", list(kinds)), ("recycle+target k=20", every))
        for task in tasks
    ]
