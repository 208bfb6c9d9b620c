"""The study's cells as CSV, one row a cell, for those who count on."""

import csv
import io

from recycle_cli.records import StudyArm, StudyDocument, StudyFailure, StudyRow
from recycle_cli.reporting.index import first_metric

FIELDS = [
    "method",
    "role",
    "selection",
    "k",
    "with_target",
    "task",
    "seed",
    "metric",
    "value",
    "interval_low",
    "interval_high",
    "p_value_against_target",
    "valid_loss",
    "adapters",
    "target_share",
    "elapsed_s",
    "scored_s",
    "peak_memory_bytes",
    "path",
    "error",
]


def render_cells(study: StudyDocument) -> str:
    """The table's cells, then those that failed, with their error; figures are unrounded.

    All metrics follow in columns of their own, as in `metrics.acc`.
    """
    arms = {arm.name: arm for arm in study.arms}
    metrics = sorted({name for row in study.table for name in row.metrics})
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*FIELDS, *(f"metrics.{name}" for name in metrics)], lineterminator="\n"
    )
    writer.writeheader()
    for row in study.table:
        writer.writerow({**_arm_fields(arms.get(row.method)), **_cell_fields(row)})
    for failure in study.failures:
        writer.writerow({**_arm_fields(arms.get(failure.method)), **_failure_fields(failure)})
    return text.getvalue()


def _arm_fields(arm: StudyArm | None) -> dict[str, object]:
    return arm.model_dump(include={"role", "selection", "k", "with_target"}) if arm else {}


def _cell_fields(row: StudyRow) -> dict[str, object]:
    metric, value = first_metric(row)
    fields = row.model_dump(include=set(FIELDS))
    fields |= {"metric": metric, "value": value}
    fields |= {"interval_low": row.interval[0], "interval_high": row.interval[1]}
    return fields | {f"metrics.{name}": value for name, value in row.metrics.items()}


def _failure_fields(failure: StudyFailure) -> dict[str, object]:
    return failure.model_dump(include=set(FIELDS))
