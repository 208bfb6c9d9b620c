"""`recycle study`: methods x tasks x seeds with their controls, each run once; and the verdict."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.base_names import base_name_given
from recycle_cli.progress import Progress
from recycle_cli.records import StudyResults
from recycle_cli.settings import Settings
from recycle_cli.workflows.evaluate_tasks import check_no_task_twice
from recycle_cli.workflows.hands import Hands, Lost, ManyProcesses, OwnHands, RayCluster, each
from recycle_cli.workflows.licenses import license_warnings
from recycle_cli.workflows.output_folder import RECORD_FILE, write_record
from recycle_cli.workflows.provenance import Clock, shown
from recycle_cli.workflows.study_arms import arms_of
from recycle_cli.workflows.study_conclude import conclude, unused
from recycle_cli.workflows.study_config import StudyConfig
from recycle_cli.workflows.study_graph import Node, Schedule
from recycle_cli.workflows.study_plan import (
    Plan,
    ask_for_targets,
    check_counts,
    find_pool,
    load_tasks,
    plan_study,
)
from recycle_cli.workflows.study_runs import AskDigest, Common, Employer, Failure, Run
from recycle_cli.workflows.study_store import RunStore

if TYPE_CHECKING:
    from recycle_cli.evaluation.tasks import Task
    from recycle_cli.workflows.adapters import Source

RUNS = "runs"
CONFIG_FILE = "study.yaml"
RESULTS_FILE = "results.json"
REPORT_FILES = ("report.html", "report.md", "results.csv", RESULTS_FILE)
FILES = {RUNS, CONFIG_FILE, RECORD_FILE, *REPORT_FILES}
"""What a study writes into its folder."""


@dataclass(frozen=True)
class StudyRequest:
    """What to study, where, and with how many hands.

    Args:
        config: what is compared.
        out: the folder of the study; one that was interrupted goes on.
        reuse: folders of other studies, whose finished runs are taken.
        jobs: processes that run, at least 1.
        threads: cores of each; None to share those of the machine.
        ray: the address of a Ray cluster that runs instead, or None.
    """

    config: StudyConfig
    out: Path
    reuse: tuple[Path, ...] = ()
    jobs: int = 1
    threads: int | None = None
    ray: str | None = None

    @property
    def base_model(self) -> str:
        """Its canonical name."""
        return base_name_given(self.config.base_model)

    @property
    def cores(self) -> int:
        """That each process uses."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.jobs)

    def command(self) -> list[str]:
        """The command line that asks for the same."""
        config = shown(self.out / CONFIG_FILE)
        return ["recycle", "study", "--config", config, "--out", shown(self.out)]

    def store(self) -> RunStore:
        """Where its runs are kept."""
        return RunStore(self.out.absolute() / RUNS, tuple(f.absolute() / RUNS for f in self.reuse))


@dataclass(frozen=True)
class Material:
    """What a study works on."""

    tasks: "tuple[Task, ...]"
    pool: "tuple[Source, ...]"


def check_study(request: StudyRequest, settings: Settings) -> Material:
    """Checks, before anything is loaded, that a study can be run.

    Raises:
        InputError: a task or the pool does not do, or `out` holds something else.
        RecycleError: the index holds no adapter of this base model.
    """
    out = request.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RUNS).is_dir():
        raise InputError(f"{out} holds something that no study wrote", "name another --out")
    for folder in request.reuse:
        if not (folder / RUNS).is_dir():
            raise InputError(f"--reuse {folder} is no folder of a study", "name one with runs/")
    if request.jobs > 1 and request.ray:
        raise InputError("--jobs and --ray both say who runs it", "leave one of them out")
    tasks = load_tasks(request.config)
    check_no_task_twice(tasks)
    pool = find_pool(request.config.pool, request.base_model, settings)
    check_counts(arms_of(request.config), pool)
    return Material(tasks, pool)


def study(
    request: StudyRequest, material: Material, settings: Settings, progress: Progress
) -> StudyResults:
    """Runs what is missing of a study, and writes its report.

    Args:
        request: what to study.
        material: from `check_study`.
        settings: where the index is, and where the model runs.
        progress: told of each run.

    Raises:
        InputError: another study is at work in the same folder.
        RecycleError: the base model cannot be loaded, or not one cell could be finished.
    """
    clock, store = Clock(), request.store()
    with store.locked():
        _write_config(request)
        progress.stage("loading the base model")
        with _hands(request, settings) as hands:
            plan = plan_study(request.config, _common(request, hands), *_parts(material))
            ask_for_targets(plan)
            tidy = _Tidy(plan)
            Schedule(plan.nodes, store, hands, progress, tidy.up).go()
        _check_something_done(plan)
        for node in unused(plan, request.config.keep):
            _drop(node)
        results = conclude(plan, str(request.out.absolute()), clock, request.command())
        _write_report(results, request.out)
        write_record(request.out / RECORD_FILE, results.study)
    return results


def _parts(material: Material) -> "tuple[tuple[Task, ...], tuple[Source, ...]]":
    return material.tasks, material.pool


def _common(request: StudyRequest, hands: Hands[Any, Any]) -> Common:
    config = request.config
    ((_, digest),) = each(hands, [AskDigest()])
    if isinstance(digest, Lost):
        raise RecycleError(
            f"the base model {request.base_model!r} could not be loaded: {digest.message}",
            "see whether memory suffices for as many processes: --jobs",
        )
    return Common(
        store=request.store(),
        base_model=request.base_model,
        base_digest=str(digest),
        rows=config.rows,
        test_rows=config.test_rows,
        max_new_tokens=config.max_new_tokens,
        max_memory=config.max_memory,
    )


def _hands(
    request: StudyRequest, settings: Settings
) -> Hands[Run | AskDigest, Failure | str | None]:
    employer = Employer(request.base_model, settings, request.cores, request.jobs)
    if request.ray is not None:
        return RayCluster(replace(employer, sharing=1), request.ray, request.threads or 1)
    if request.jobs > 1:
        return ManyProcesses(employer, request.jobs)
    return OwnHands(employer())


def _write_config(request: StudyRequest) -> None:
    """Keeps the configuration, with all its defaults, so that the study can be run again."""
    import yaml

    fields = request.config.model_dump(mode="json", exclude_none=True)
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    (request.out / CONFIG_FILE).write_text(text, encoding="utf-8")


@dataclass
class _Tidy:
    """Drops adapters that will not be kept as soon as that is known, so that a study takes little
    more room than its results."""

    plan: Plan

    def up(self, node: Node) -> None:
        """Looks at what has become needless now that a run is done."""
        if self.plan.config.keep == "best" and node in self.plan.cells.values():
            for one in unused(self.plan, "best"):
                _drop(one)


def _drop(node: Node) -> None:
    if node.run is not None:
        node.run.common.store.drop_adapter(node.run.key)


def _check_something_done(plan: Plan) -> None:
    if any(node.outcome is not None for node in plan.cells.values()):
        return
    errors = [node.error for node in plan.cells.values() if node.error]
    raise RecycleError(
        f"none of the {len(plan.cells)} cells could be finished: {errors[0]}",
        "mend that, and run the study again: it goes on where it was",
    )


def report(folder: Path) -> StudyResults:
    """Writes the report of a study again, from its results.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    import json

    file = folder / RESULTS_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        schema = str(fields["schema"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file} cannot be read: {error}", "name the folder of a study that was run"
        ) from error
    if schema != StudyResults.schema_name():
        raise InputError(
            f"{file} is a {schema!r}; this version reads {StudyResults.schema_name()!r}",
            "use the version of recycle that wrote it",
        )
    results = StudyResults.from_fields(fields, str(file))
    _write_report(results, folder)
    return results


def _write_report(results: StudyResults, folder: Path) -> None:
    from recycle_cli.reporting.report import write_report

    licenses = [source.license for source in results.study.sources]
    write_report(results, folder, license_warnings(licenses))
