"""Tasks in lm-eval's own YAML form, with their data beside them."""

import json
from pathlib import Path
from typing import Any

import yaml

CHOICES = ("red", "green")


def write_lm_eval_tasks(folder: Path, rows: int = 40) -> Path:
    """Four tasks and a group: choices, generated text under two filters, likelihoods of answers,
    F1 over all rows; the choice task and the last make up the group.

    Args:
        folder: where the YAML files are written.
        rows: how many test rows there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, thing in (("train", 20, "thing"), ("test", rows, "item")):
        lines = [
            {
                "question": f"Which colour has {thing} {number}?",
                "options": list(CHOICES),
                "gold": number * number % 7 % 2,
            }
            for number in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }
    tasks: dict[str, dict[str, Any]] = {
        "tiny_choice": choice,
        "tiny_f1": {
            **choice,
            "metric_list": [
                _mean("acc"),
                {"metric": "f1", "aggregation": "f1", "higher_is_better": True},
            ],
        },
        "tiny_text": {
            "output_type": "generate_until",
            "doc_to_target": "{{options[gold]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [
                {"name": "strict", "filter": _filters({"regex_pattern": r"(\w)"})},
                {"name": "loose", "filter": _filters(None)},
            ],
            "metric_list": [_mean("exact_match")],
        },
        "tiny_answer": {"output_type": "loglikelihood", "doc_to_target": "{{options[gold]}}"},
    }
    for name, fields in tasks.items():
        _write(folder / f"{name}.yaml", {**_common(folder), "task": name, **fields})
    group = {
        "group": "tiny_group",
        "task": ["tiny_choice", "tiny_f1"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    _write(folder / "tiny_group.yaml", group)
    missing = {**_common(folder), "task": "tiny_missing", **choice, "dataset_path": "no/such-data"}
    _write(folder / "tiny_missing.yaml", {k: v for k, v in missing.items() if "kwargs" not in k})
    return folder


def _common(folder: Path) -> dict[str, Any]:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "metadata": {"version": 1.0},
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _filters(regex: dict[str, str] | None) -> list[dict[str, str]]:
    first = {"function": "take_first"}
    return [{"function": "regex", **regex}, first] if regex else [first]


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(fields))
