"""Documents of `tune`."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from recycle_cli.records.document import AdapterRef, Document, Part, Run, TaskRef


class TuneTask(TaskRef):
    """The task of a tuning run, with the number of rows trained on and validated on."""

    train_rows: int
    valid_rows: int


class MixedAdapter(AdapterRef):
    """A source of a mixture. `coefficient_mean` and `coefficient_max_abs` sum up its
    coefficients after the activation function, over the modules that it has; where the result
    routes token by token, its shares of the tokens of some training rows."""

    role: Literal["pool", "target"]
    license: str | None = None
    coefficient_mean: float
    coefficient_max_abs: float


class BestStep(Part):
    """The step whose weights were kept (0 is the start), and its validation loss in nats."""

    step: int
    valid_loss: float


class SweepTrial(Part):
    """A short training with one candidate for the rate, the rank, or both: how many steps it had,
    how many more were trained before modules were scored, and its lowest validation loss in nats.
    That is null where a loss was no longer a finite number; the steps are then those that it should
    have had."""

    lr: float | None = None
    rank: int | None = None
    steps: int
    proxy_steps: int = 0
    valid_loss: float | None


class TuneSweep(Part):
    """How the rate and the rank of a LoRA were found: the candidates, the short trainings that they
    had, and the steps of every kind and the seconds that all of these took, in all processes where
    the run was interrupted, beyond the training itself."""

    grid: dict[str, list[float]]
    trials: list[SweepTrial]
    chosen: dict[str, float]
    steps: int
    elapsed_s: float


class TuneDocument(Document, Run):
    """A tuned adapter: a target LoRA (`adapters` is empty), a mixture folded into one LoRA, or a
    routed adapter, which is no LoRA; then `rank` is the largest sum of ranks in a module.

    `history` holds [step, validation loss] pairs; `figures` are the method's own; `energy_kept` is
    the share of the squared norm that a limit on the export's rank kept, in [0, 1];
    `max_logit_deviation` compares the exported adapter with the model as trained, on one batch of
    training rows; `files` are all that was written, below `path`; `sweep` tells how a rate or rank
    that was left to be found was.
    """

    kind: ClassVar[str] = "tune"

    method: str
    settings: dict[str, Any]
    base_model: str
    task: TuneTask
    adapters: list[MixedAdapter]
    target: AdapterRef | None = None
    best: BestStep
    history: list[tuple[int, float]]
    figures: dict[str, float] = Field(default_factory=dict)
    rank: int
    energy_kept: float = 1.0
    max_logit_deviation: float
    path: str
    files: list[str] = Field(default_factory=list)
    sha256: str
    warnings: list[str]
    sweep: TuneSweep | None = None


class BudgetDocument(Document):
    """The memory that a tuning would take, told by `--dry-run`.

    `model_bytes` and `adapters_bytes` are those of the base model's weights and of the adapters'
    factors in its dtype; `training_bytes` is what a step takes beyond those, with `rows_a_pass` of
    its `batch_size` rows at once: gradients, moments, what is kept for the backward pass.
    `free_bytes` is what may be taken. `products` tells how the adapters' products are computed.
    """

    kind: ClassVar[str] = "budget"

    method: str
    base_model: str
    device: str
    dtype: str
    adapters: int
    trained_numbers: int
    model_bytes: int
    adapters_bytes: int
    training_bytes: int
    free_bytes: int
    batch_size: int
    rows_a_pass: int
    gradient_checkpointing: bool
    products: str
