"""What the report's words mean: every p-value and interval is explained here, once."""

from recycle_cli.reporting.document import Terms
from recycle_cli.reporting.index import StudyIndex
from recycle_cli.reporting.tables import P_TITLE, no_difference_title

ROLES = {
    "base": ("base model", "The model without any adapter."),
    "target": ("target LoRA", "A LoRA trained from scratch on the task's own training rows."),
    "recycled": (
        "recycled adapters",
        "Adapters that others trained and published, mixed or merged for this task.",
    ),
    "control": (
        "random adapters (control)",
        "Adapters with weights drawn at random in the shape and size of the recycled ones, put "
        "through the same steps. A gain that they reach too needs nothing the pool has learned.",
    ),
    "rescaled": (
        "rescaled target LoRA (control)",
        "The target LoRA with its strength tuned and nothing else in the mixture. It shows how "
        "much of a gain is a matter of strength alone.",
    ),
    "single": ("single adapter", "One adapter of the pool as it is, without any mixing."),
}

# By what the names of tests hold.
TESTS = {
    "McNemar": (
        "Counts the rows that just one of two arms gets right, and asks whether either has more of "
        "them than a fair coin would give."
    ),
    "sign-flip test over rows": (
        "Lets each row's difference change sides at random, many times or in every possible way, "
        "and counts how often that yields a mean as large as the one seen."
    ),
    "sign-flip test over tasks": (
        "The same with the tasks' mean differences, each as one: it speaks of other tasks too."
    ),
}


def glossary(index: StudyIndex) -> Terms:
    """The words that this report uses."""
    roles = [arm.role for arm in index.arms.values()]
    items = [
        ("arm", "One way to get an adapter, done the same on every task and with every seed."),
        *(words for role, words in ROLES.items() if role in roles),
        ("cell", "One arm on one task with one seed."),
        ("point", "A percentage point: from 60 % to 62 % is 2 points."),
        *_intervals(index),
        *_p_values(index),
    ]
    if any(arm.k is not None for arm in index.arms.values()):
        items.append(("k", "How many adapters of the pool an arm is given."))
    if index.study.selections:
        items += [
            (
                "selection, score",
                "How adapters were ranked for a task, and what each was given: higher is better, "
                "on a scale of the method's own. Places with = are ties; the log-likelihood of "
                "the answers decides among them.",
            ),
            ("pass", "One run of the model over a batch of rows: the unit of work."),
        ]
    return Terms(items)


def _intervals(index: StudyIndex) -> list[tuple[str, str]]:
    if not index.study.table:
        return []
    items = [
        (
            "95 % interval of a score",
            "Where the score would mostly come out if other rows of the same kind were drawn. On "
            "one task it is about its rows; of a mean over tasks, about the tasks and their rows.",
        )
    ]
    if index.study.comparisons:
        items.append(
            (
                "95 % interval of a difference",
                "The same for the difference of two arms on the same rows: the rows are drawn "
                "again many times, and 95 % of the differences fall within it. One that holds 0 "
                "leaves open which arm is better.",
            )
        )
    return items


def _p_values(index: StudyIndex) -> list[tuple[str, str]]:
    if not index.study.comparisons:
        return []
    tests = sorted({comparison.test for comparison in index.study.comparisons})
    items = [
        (
            "p",
            "How often luck alone would produce a difference at least this large if the two arms "
            f"were equally good: 0.03 means 3 times in 100. How it was found: {'; '.join(tests)}.",
        ),
        *((word, meaning) for word, meaning in TESTS.items() if any(word in t for t in tests)),
        (
            P_TITLE,
            "p, raised for the number of comparisons with the same baseline: who tries 20 things "
            "finds one that looks good by luck. Holm's correction; from 6 tasks on, that of "
            "Westfall and Young. Below 0.05 is set in bold and counts as a real difference.",
        ),
    ]
    if index.margin and any(index.no_difference(name) is not None for name in index.arms):
        items.append(
            (
                no_difference_title(index),
                "A high p does not show that two arms are equal; this does. Below 0.05, the arms "
                "differ by less than this, by two one-sided tests.",
            )
        )
    return items
