"""Every document that a command prints, field by field, as the files in golden/ hold them.

Measured numbers, hashes and versions are blanked; all else has to be the same. After a change that
is meant: RECYCLE_UPDATE_GOLDEN=1 pytest tests/cli/test_golden_documents.py
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.command import POOL, Recycle

from recycle_cli.records import DOCUMENTS, read_documents

GOLDEN = Path(__file__).parent / "golden"
EXACT = {"settings", "params", "alpha", "weight"}
WORDED = {"sentence", "notes"}
NUMBER = re.compile(r"\d+(\.\d+)?")
FEW_STEPS = ("--steps", "2", "--eval-every", "1", "--batch-size", "4")
COMMANDS = {
    "crawl": "crawl POOL --base-model BASE",
    "index": "index",
    "list": "index list --sort id --status all",
    "stats": "index stats",
    "twins": "crawl twins --base-model BASE",
    "duplicates": "index duplicates",
    "verify": "index verify",
    "forget": "index forget again plain",
    "select": "select --method random -k 2 --base-model BASE",
    "methods": "merge --list",
    "merge": "merge lab/plain shop/mlp --base-model BASE --rank 3 --out merged",
    "lora": "tune --task TASK --base-model BASE --out target --rank 2 --target-module q_proj FEW",
    "recycle": "tune lab/plain --target target --task TASK --base-model BASE --out mixed FEW",
    "budget": "tune lab/plain --task TASK --base-model BASE --out new --dry-run",
    "eval": "eval mixed target --task TASK --base-model BASE --baseline target --rows 35",
    "plan": "study --task TASK --base-model BASE -k 2 --dry-run",
    "study": "study --task TASK --base-model BASE -k 1 --rows 30 --test-rows 30 STEP --out grid",
}


def blanked(value: Any, places: dict[str, str], key: str = "") -> Any:
    """The value without what differs between machines and runs."""
    if isinstance(value, dict):
        if key == "versions":
            return sorted(value)
        return {
            blanked(k, places): placed(v, places) if k in EXACT else blanked(v, places, k)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [blanked(one, places, key) for one in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float) or key.endswith("bytes"):
        return type(value)(0)
    if key in {"sha256", "fingerprint"}:
        return "0" * len(value)
    if isinstance(value, str):
        value = NUMBER.sub("0", value) if key in WORDED else placed(value, places)
        return re.sub(r"[0-9a-f]{64}|(?<=sha256:)[0-9a-f]{12}|(?<=runs/)\w{24}", "SHA256", value)
    return value


def placed(value: Any, places: dict[str, str]) -> Any:
    """The value with the names of the places that differ between machines."""
    text = json.dumps(value)
    for place, name in places.items():
        text = text.replace(place, name)
    return json.loads(text)


def put_twins(original: Path, folder: Path) -> None:
    """The same file under another name, and the same tensors in another file."""
    for name in ("again", "plain"):
        shutil.copytree(original, folder / name)
    weights = folder / "again/adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"saved": "again"})


def test_documents_are_as_recorded(
    recycle: Recycle, pool: Path, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    places = {str(pool): "POOL", str(pico_folder): "BASE", str(task): "TASK", str(tmp_path): "HERE"}
    put_twins(pool / "lab/plain", tmp_path / "twins")
    words_for = {name: [place] for place, name in places.items()} | {
        "FEW": list(FEW_STEPS),
        "STEP": ["--steps", "1"],
    }
    for name, line in COMMANDS.items():
        words = [word for part in line.split() for word in words_for.get(part, [part])]
        printed = recycle(*words, "--json")
        found = [blanked(document, places) for document in printed.documents]
        file = GOLDEN / f"{name}.json"
        if os.environ.get("RECYCLE_UPDATE_GOLDEN"):
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        assert found == json.loads(file.read_text()), name
        again = [document.to_line() for document in read_documents(printed.stdout.splitlines())]
        assert again == printed.stdout.splitlines()
    assert len(POOL) == 4


# Those of a study's results stand in a file of their own, which the tests of reporting/ compare.
@pytest.mark.parametrize("kind", sorted(set(DOCUMENTS) - {"results"}))
def test_every_kind_of_document_is_recorded(kind: str) -> None:
    recorded = [one for file in GOLDEN.glob("*.json") for one in json.loads(file.read_text())]
    assert f"recycle.{kind}/1" in {document["schema"] for document in recorded}
