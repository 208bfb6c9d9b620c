"""What a study compares: the fields of its YAML file, or of the flags that stand for one."""

import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.merging.catalog import METHODS as MERGES
from recycle_cli.merging.catalog import find_merge_method
from recycle_cli.merging.parameters import PARAMETERS as MERGE_PARAMETERS
from recycle_cli.parameters import Value
from recycle_cli.selection.catalog import find_selection_method
from recycle_cli.tuning.catalog import METHODS as TUNINGS
from recycle_cli.tuning.catalog import Pace, find_tuning_method
from recycle_cli.tuning.choices import LR_SCHEDULES
from recycle_cli.tuning.lora_catalog import AXES, takers
from recycle_cli.tuning.parameters import PARAMETERS as TUNE_PARAMETERS
from recycle_cli.workflows.tune_request import LORA

Control = Literal["random", "rescale", "single"]
Keep = Literal["target", "best", "all", "none"]
PACE = tuple(Pace.__dataclass_fields__)
HINT = "see docs/study.md for the fields of a study"
Count = Annotated[int, Field(ge=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PaceChoice(_Fields):
    """What is said of a pace: fields of `Pace`; None leaves them at the method's."""

    lr: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    batch_size: Count | None = None
    lr_schedule: str | None = None
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    eval_every: Count | None = None
    patience: Count | None = None

    @field_validator("lr_schedule")
    @classmethod
    def _check_schedule(cls, name: str | None) -> str | None:
        if name is not None and name not in LR_SCHEDULES:
            raise unknown_name("lr_schedule", name, LR_SCHEDULES)
        return name


def _pace(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a pace, with the numbers that YAML takes for text, such as 1e-3."""
    try:
        read = PaceChoice.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
    return {k: getattr(read, k) if isinstance(v, str) else v for k, v in fields.items()}


def _check_names(
    of: str, given: Iterable[str], parameters: Container[str], fields: Iterable[str]
) -> None:
    """Refuses what is no parameter of any method; those that go elsewhere the catalog refuses.

    Args:
        of: what they are fields of.
        given: their names.
        parameters: of all methods.
        fields: what there may be here.
    """
    for name in given:
        if name not in parameters:
            raise unknown_name(f"field of {of}", name, fields)


class MethodChoice(_Fields):
    """A method of `tune` or `merge`, with what it does not leave at its defaults: parameters, and,
    for `tune`, the pace."""

    model_config = ConfigDict(extra="allow")

    method: str

    @property
    def given(self) -> dict[str, Any]:
        """What is not left at its defaults."""
        return dict(self.model_extra or {})

    @property
    def parameters(self) -> dict[str, Value]:
        """Of the method itself."""
        return {name: value for name, value in self.given.items() if name not in PACE}

    @property
    def pace(self) -> dict[str, Any]:
        """How long and how fast it trains."""
        return _pace({name: value for name, value in self.given.items() if name in PACE})

    @property
    def merges(self) -> bool:
        """Whether it needs no data."""
        return self.method in MERGES and self.method not in TUNINGS

    @property
    def name(self) -> str:
        """It and its settings, in words."""
        given = ", ".join(f"{key}={value}" for key, value in self.given.items())
        return f"{self.method} ({given})" if given else self.method

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.merges:
            if self.pace:
                raise ValueError(f"{self.method} does not train: leave out {next(iter(self.pace))}")
            rule = find_merge_method(self.method)
            _check_names(self.method, self.parameters, MERGE_PARAMETERS, rule.defaults)
            rule.settings(self.parameters)
            return self
        if self.method not in TUNINGS:
            mixing = [m.name for m in TUNINGS.values() if m.takes == "adapters"]
            raise unknown_name("method", self.method, [*mixing, *MERGES])
        found = find_tuning_method(self.method)
        if found.takes != "adapters":
            raise ValueError(f"{self.method} takes no adapters; it is run as a control or a target")
        _check_names(self.method, self.parameters, TUNE_PARAMETERS, [*found.defaults, *PACE])
        found.settings(self.parameters, True, False)
        _pace(self.pace)
        return self


class GridBlock(_Fields):
    """Every combination of its lists is an arm.

    Args:
        methods: of `tune` and `merge`.
        selection: how the adapters that they are given are chosen: methods of `select`.
        k: how many.
        with_target: beside the target LoRA, or without.
        controls: `random`: each method of `tune` also with random adapters in the place of the
            real ones; `rescale`: the target LoRA rescaled alone; `single`: the adapter that the
            selection puts first, as it is.
    """

    methods: tuple[MethodChoice, ...] = Field(min_length=1)
    selection: tuple[str, ...] = Field(("evaluation",), min_length=1)
    k: tuple[Count, ...] = Field((10,), min_length=1)
    with_target: tuple[bool, ...] = Field((False, True), min_length=1)
    controls: tuple[Control, ...] = ("random", "rescale", "single")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.selection:
            find_selection_method(name)
        return self


class TargetChoice(PaceChoice):
    """The target LoRA: its shape and pace; None leaves them at the paper's (arXiv 2602.12323). Any
    other field says how it is trained, as a parameter of the method `lora` of `tune`: `optimizer`,
    `architecture`, `schedule`, `allocation`, and those of what they name."""

    model_config = ConfigDict(extra="allow")

    rank: Count | None = None
    alpha: float | None = None
    dropout: float | None = None
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()

    @property
    def pace(self) -> dict[str, Any]:
        """What is said of its pace."""
        return {name: value for name in PACE if (value := getattr(self, name)) is not None}

    @property
    def parameters(self) -> dict[str, Value]:
        """How it is trained."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = [name for name in TUNE_PARAMETERS if name in AXES or takers(name)]
        fields += type(self).model_fields
        _check_names("target", self.parameters, TUNE_PARAMETERS, fields)
        find_tuning_method(LORA).settings(self.parameters, target=False)
        return self


class PoolChoice(_Fields):
    """Which adapters of the index are chosen from: all of the base model, unless more is asked.

    Args:
        ids_from: a file of Hub ids, one a line: these alone.
        folder: those that were found in this folder.
        search, author, license, source, min_rank, max_rank, target_module: as of `index list`.
    """

    ids_from: str | None = None
    folder: str | None = None
    search: str | None = None
    author: str | None = None
    license: str | None = None
    source: Literal["hub", "folder"] | None = None
    min_rank: Count | None = None
    max_rank: Count | None = None
    target_module: str | None = None


class StudyConfig(_Fields):
    """A study.

    Args:
        name: what its report is headed.
        base_model: as of every command.
        tasks: paths as `--task` takes them, from the file's folder; or the fields of a task.yaml.
        missing_tasks: tasks that belong to the study and cannot be had, by name, with the reason.
        pool: which adapters are chosen from.
        rows: how many of a task's training rows may be used, validation rows included.
        test_rows: how many test rows are scored, the first ones; all with None.
        seeds: of the split, the order of rows, what is drawn.
        target: the target LoRA.
        pace: of all that is trained but the target LoRA, unless a method says otherwise.
        grid: what is compared.
        allow_overlap: accept test rows that are training rows too.
        score_on: what selections that score rows see: the training part, or all rows as the paper.
        max_new_tokens: the longest answer that is generated.
        keep: which adapters stay on disk: the target LoRAs (`target`), the best of each task too
            (`best`), `all`, or `none`.
        margin: how many points apart still counts as equal.
        max_memory: bytes that training may take beyond the model.
        fast: less than it should be for figures that are to be relied on; its report says so.
    """

    name: str = "study"
    base_model: str = EMBEDDED_NAME
    tasks: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    missing_tasks: dict[str, str] = Field(default_factory=dict)
    pool: PoolChoice = PoolChoice()
    rows: Count | None = 100
    test_rows: Count | None = None
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    target: TargetChoice = TargetChoice()
    pace: dict[str, Any] = Field(default_factory=dict)
    grid: tuple[GridBlock, ...] = Field(min_length=1)
    allow_overlap: bool = False
    score_on: Literal["train", "all"] = "train"
    max_new_tokens: Count = 30
    keep: Keep = "best"
    margin: float = Field(1.0, gt=0, lt=100)
    max_memory: Count | None = None
    fast: bool = False

    @field_validator("pace", mode="after")
    @classmethod
    def _check_pace(cls, pace: dict[str, Any]) -> dict[str, Any]:
        for name in pace:
            if name not in PACE:
                raise unknown_name("field of pace", name, PACE)
        return _pace(pace)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("tasks", "seeds"):
            values = [str(value) for value in getattr(self, field)]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{field} names {twice} twice")
        return self


def config_of(fields: dict[str, Any], where: str) -> StudyConfig:
    """The study that some fields describe.

    Args:
        fields: as of `StudyConfig`.
        where: how errors name their source.

    Raises:
        InputError: a field is unknown, missing, or holds what it cannot.
    """
    try:
        return StudyConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(str(step) for step in first["loc"]), first["input"]
        seen = f" is {value!r}" if field and isinstance(value, str | int | float | None) else ""
        message = first["msg"].removeprefix("Value error, ").replace("tuple", "list")
        named = f"{field}{seen}: " if field else ""
        raise InputError(f"{where}: {named}{message}", HINT) from error


def read_config(path: Path, instead: dict[str, Any] | None = None) -> StudyConfig:
    """The study that a YAML file describes.

    Args:
        path: the file; the paths in it are taken from its folder.
        instead: fields that take the place of the file's.

    Raises:
        InputError: the file cannot be read, is no YAML, or `config_of` refuses its fields.
    """
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} cannot be read: {error}", "name a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise InputError(f"{where} is not YAML", HINT) from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} does not hold fields", HINT)
    return config_of({**anchored(fields, path.absolute().parent), **(instead or {})}, str(path))


def anchored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields with paths that do not hang on where the command runs.

    Args:
        fields: as of `StudyConfig`.
        folder: what relative paths are taken from.
    """
    found = dict(fields)
    tasks, pool = found.get("tasks"), found.get("pool")
    if isinstance(tasks, list):
        found["tasks"] = [_at(folder, task) for task in tasks]
    if isinstance(pool, dict):
        places = {key: _at(folder, pool[key]) for key in ("ids_from", "folder") if key in pool}
        found["pool"] = {**pool, **places}
    if found.get("base_model", EMBEDDED_NAME) != EMBEDDED_NAME:
        found["base_model"] = _at(folder, found["base_model"])
    return found


def _at(folder: Path, value: Any) -> Any:
    """A path from a folder; what is no path that exists there stays as it is."""
    if not isinstance(value, str):
        return value
    path = Path(os.path.expandvars(value)).expanduser()
    return str(folder / path) if (folder / path).exists() else value
