"""The first screen: the verdict, what to do about it, and how it was decided, in plain words."""

from recycle_cli.records import StudyDocument
from recycle_cli.reporting.document import Opening, Place
from recycle_cli.reporting.formatting import counted, listed
from recycle_cli.reporting.index import StudyIndex

KEEPING = "--keep all"
READ_TABLE = "Compare the arms in the table below before you rely on any of them."

# By the verdict's kind, as `evaluation/verdict.py` names them.
ADVICE = {
    "beats_target": "Use the recycled adapter: it is worth the adapters that went into it.",
    "helps_over_base": (
        "Recycle if you would rather not train a LoRA of your own; score more to learn which of "
        "the two is better."
    ),
    "rescaling": (
        "Rescale your own LoRA instead: one learned number for each module of it gains so much "
        "that nothing was seen of what recycled adapters add."
    ),
    "regularisation": (
        "Do not credit the pool: random adapters gain so much that nothing was seen of what its "
        "adapters add. Use the best adapter if you like, but collecting others' adapters is not "
        "known to have made it better."
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
    "too_few_rows": (
        "Score more before you decide; until then a LoRA of your own is the simpler choice."
    ),
    "incomplete": "Mend what failed, and run the study again: it takes what is done.",
}
# Their advice is to take the adapter that the verdict is about.
TAKING = ("beats_target", "helps_over_base")
FAST = (
    "Run it in full before you act on it: this was a fast run, with fewer rows and steps than it "
    "takes for figures and a verdict that can be relied on."
)


def opening(index: StudyIndex) -> Opening:
    """What a reader has to know who reads no further."""
    study = index.study
    # What is claimed stands before the first colon, the figures behind it after.
    claim, colon, figures = study.verdict.sentence.partition(": ")
    return Opening(
        headline=f"{claim}." if colon else claim,
        figures=figures[:1].upper() + figures[1:],
        advice=FAST if study.fast else ADVICE.get(study.verdict.kind, READ_TABLE),
        adapter=_taken(index) if study.verdict.kind in TAKING else _best(index),
        notes=_notes(study),
        decided=_decided(index),
    )


def _taken(index: StudyIndex) -> Place | None:
    """The adapter that the verdict is about; of several, that of the first task and seed."""
    method = index.study.verdict.method
    runs = [row for row in index.study.table if row.method == method]
    if not runs:
        return _best(index)
    for run in runs:
        if run.path:
            words = f"It is that of {method}; for {run.task} with seed {run.seed} it is in"
            return Place(words, run.path)
    return Place(f"It is that of {method}, and was not kept: run the study again with", KEEPING)


def _best(index: StudyIndex) -> Place | None:
    """The adapter with the lowest validation loss."""
    folder = index.study.adapter
    if folder is None:
        return None
    run = next((row for row in index.study.table if row.path == folder), None)
    of_all = f"Of the adapters made for {run.task}, that of {run.method}" if run else "The adapter"
    verb = "has the lowest validation loss; it is" if run else "with the lowest validation loss is"
    return Place(f"{of_all} {verb} in", folder)


def _notes(study: StudyDocument) -> list[str]:
    notes = list(study.verdict.notes)
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
            "in 20 times (p below 0.05), with allowance made for how many comparisons were tried."
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
