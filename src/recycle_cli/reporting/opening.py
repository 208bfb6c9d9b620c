"""The first screen: the verdict, what to do about it, and how it was decided, in plain words."""

from recycle_cli.records import StudyDocument
from recycle_cli.reporting.document import Opening
from recycle_cli.reporting.formatting import counted, listed
from recycle_cli.reporting.index import StudyIndex

READ_TABLE = "Compare the arms in the table below before you rely on any of them."

# By the verdict's kind, as `evaluation/verdict.py` names them.
ADVICE = {
    "beats_target": "Use the recycled adapter: it is worth the adapters that went into it.",
    "helps_over_base": (
        "Recycle if you would rather not train a LoRA of your own; score more test rows to learn "
        "which of the two is better."
    ),
    "rescaling": (
        "Rescale your own LoRA instead: one number gains as much as the recycled adapters do."
    ),
    "regularisation": (
        "Do not credit the pool: random adapters gain as much. Use the best adapter if you like, "
        "but collecting others' adapters is not what made it better."
    ),
    "no_control": "Run the random controls before you credit the pool with the gain.",
    "matches_target": "Use whichever is less work to make: the two do equally well.",
    "worse_than_target": (
        "Train a LoRA on your own examples and use that; recycling is more work and does worse."
    ),
    "relevant_adapter": (
        "Look at the adapter that is named, and at its licence: it was trained on something close "
        "to your task, and may do as it is."
    ),
    "no_gain": "Do not recycle for this task; train a LoRA of your own, or gather more examples.",
    "too_few_rows": "Score more test rows before you decide; until then use the simplest arm.",
    "incomplete": "Run the arms that are missing, then read the report again.",
}
FAST = (
    "This was a fast run, with fewer rows and steps than it takes for figures that can be relied "
    "on."
)


def opening(index: StudyIndex) -> Opening:
    """What a reader has to know who reads no further."""
    study = index.study
    # What is claimed stands before the first colon, the figures behind it after.
    claim, colon, figures = study.verdict.sentence.partition(": ")
    return Opening(
        headline=f"{claim}." if colon else claim,
        figures=figures,
        advice=ADVICE.get(study.verdict.kind, READ_TABLE),
        adapter=study.adapter,
        notes=_notes(study),
        decided=_decided(index),
    )


def _notes(study: StudyDocument) -> list[str]:
    notes = list(study.verdict.notes)
    if study.fast:
        notes.append(FAST)
    if study.cells.failed:
        notes.append(f"{counted(study.cells.failed, 'cell')} failed; see the failures below.")
    return notes


def _decided(index: StudyIndex) -> str:
    if not index.study.table:
        return ""
    steps = [_rows(index)]
    if index.study.comparisons:
        steps.append(
            "Two arms are compared row by row. Rows that both get right, or both get wrong, say "
            "nothing; of the rest, luck alone would give each about half."
        )
        if any("over tasks" in comparison.test for comparison in index.study.comparisons):
            steps.append("Then task by task: a gain has to show on most tasks, not on a few.")
        steps.append(
            "A difference counts as real only if luck would produce one this large less than once "
            "in 20 times, with allowance made for how many comparisons were tried."
        )
    if any(arm.role == "control" for arm in index.arms.values()):
        steps.append(
            "Random adapters went through the same steps as the recycled ones. What they gain too "
            "does not come from anything that the pool's adapters have learned."
        )
    return " ".join(steps)


def _rows(index: StudyIndex) -> str:
    study = index.study
    arms = counted(len(index.arms), "arm")
    rows = sum(task.test_rows for task in study.tasks)
    parts = [counted(rows, "test row")]
    if len(study.tasks) > 1:
        parts.append(counted(len(study.tasks), "task"))
    if len(index.seeds) > 1:
        parts.append(f"{counted(len(index.seeds), 'run')} with different random seeds")
    answered = listed(parts[:2]).replace(" and ", " of ") if len(study.tasks) > 1 else parts[0]
    seeds = f", in {parts[-1]}" if len(index.seeds) > 1 else ""
    return f"{arms} (an arm is one way to get an adapter) answered the same {answered}{seeds}."
