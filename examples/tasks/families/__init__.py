"""All tasks, family by family."""

from families import extraction, grammar, intent, sentiment, singles, topic, words
from families.task import Task

TASKS: tuple[Task, ...] = (
    *sentiment.TASKS,
    *topic.TASKS,
    *intent.TASKS,
    *words.TASKS,
    *grammar.TASKS,
    *extraction.TASKS,
    *singles.TASKS,
)
