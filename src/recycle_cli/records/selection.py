"""Documents of `select`."""

from typing import ClassVar, Literal

from recycle_cli.records.document import AdapterRef, Document, Part, Run, TaskRef


class ScoredAdapter(AdapterRef):
    """A selected adapter: `score` is the method's, higher is better; a target LoRA that was asked
    for has none."""

    score: float | None
    log_likelihood: float | None = None
    role: Literal["pool", "target"] = "pool"


class LeftOut(Part):
    """An adapter that could not be ranked, and why."""

    id: str
    reason: str


class SelectionCost(Part):
    """`passes` counts runs of the model over rows, `rows_scored` the rows of all of them; answers
    that the index held already cost neither. Where a method does with less than every adapter on
    every row, `rows_of_full` is what that would take, and `agreement` the share of the first k that
    the full ranking has too, null unless the index holds all its answers."""

    passes: int
    elapsed_s: float
    rows_scored: int = 0
    rows_of_full: int | None = None
    agreement: float | None = None


class SelectionDocument(Document, Run):
    """A ranking, best first. `tied_at_cut` counts the adapters left out at the score of the last
    one taken."""

    kind: ClassVar[str] = "selection"

    task: TaskRef | None = None
    base_model: str
    method: str
    k: int
    scored_on: str | None = None
    adapters: list[ScoredAdapter]
    target: AdapterRef | None = None
    left_out: list[LeftOut]
    tied_at_cut: int
    cost: SelectionCost
