"""Measures every task: the base model, and a LoRA of the demo's shape trained on 100 rows.

    python examples/tasks/measure.py [--work DIR] [--only TASK]...

Writes the table of README.md. Tasks that DIR (default: .recycle/measure) already holds are not
measured again, so that an interrupted run goes on where it stopped.
"""

import argparse
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.evaluation.tasks import load_task
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef, EvaluationDocument, read_documents
from recycle_cli.settings import read_settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.demo import FULL, HELD_OUT, TARGET_LR, TARGET_SHAPE
from recycle_cli.workflows.evaluate import EvalRequest, evaluate
from recycle_cli.workflows.provenance import versions
from recycle_cli.workflows.tune import tune
from recycle_cli.workflows.tune_request import TuneRequest

STEPS = 40
HERE = Path(__file__).parent
MARKERS = re.compile(r"(<!-- accuracy:start -->\n).*(<!-- accuracy:end -->)", re.DOTALL)


def measure(name: str, base: BaseModel, work: Path) -> None:
    """Trains and scores one task; the two evaluation documents go to `work`."""
    task = load_task(str(HERE / name))
    out = work / name
    request = TuneRequest(
        replace(task, test=()),
        base.id,
        out,
        method="lora",
        rows=FULL.rows,
        pace={"steps": STEPS, "eval_every": FULL.eval_every, "lr": TARGET_LR},
        lora=TARGET_SHAPE,
        force=True,
    )
    tuned = tune(request, [], None, base, Silent())
    source = Source(AdapterRef(id=name, sha256=tuned.sha256, path=tuned.path))
    documents = evaluate(EvalRequest((task,), base.id), [source], base, Silent()).documents
    lines = "".join(document.to_line() + "\n" for document in documents)
    (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def table(work: Path) -> str:
    """The Markdown of what was measured."""
    lines = [
        "| task | family | metric | base model | LoRA on 100 rows | gain | pool |",
        "|---|---|---|---|---|---|---|",
    ]
    gains = []
    for name, task in json.loads((HERE / "tasks.json").read_text(encoding="utf-8")).items():
        path = work / f"{name}.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                base, lora = read_documents(file, str(path))
            assert isinstance(base, EvaluationDocument)
            assert isinstance(lora, EvaluationDocument)
            metric = next(iter(base.metrics))
            gains.append(100 * (lora.metrics[metric] - base.metrics[metric]))
            cells = [f"`{name}`", task["family"], metric, _share(base), _share(lora)]
            cells += [f"{gains[-1]:+.1f}", "held out" if name in HELD_OUT else "has one"]
            lines.append(f"| {' | '.join(cells)} |")
    large = sum(gain >= 15 for gain in gains)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        "\n".join(lines)
        + f"\n\nThe gain is 15 points or more on {large} of {len(gains)} tasks. Accuracies are in "
        f"per cent of the 400 test rows, with 95 % intervals. One seed (0); rank "
        f"{TARGET_SHAPE.rank}, alpha {TARGET_SHAPE.alpha:g}, all linear modules, learning rate "
        f"{TARGET_LR:g}, {STEPS} steps of 8 rows; 80 rows to train on, 20 to choose the best "
        f"step by. Machine: {platform.machine()}, {platform.system()}; {found}.\n"
    )


def _share(document: EvaluationDocument) -> str:
    metric, value = next(iter(document.metrics.items()))
    low, high = document.interval[metric]
    return f"{100 * value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def main() -> None:
    """Measures what is missing and writes the table."""
    names = [path.parent.name for path in sorted(HERE.glob("*/train.jsonl"))]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".recycle/measure"))
    parser.add_argument("--only", action="append", choices=names)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    base = load_base_model(EMBEDDED_NAME, read_settings(None, False))
    for name in options.only or names:
        if not (options.work / f"{name}.jsonl").exists():
            print(name, flush=True)
            measure(name, base, options.work)
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = MARKERS.sub(lambda match: match[1] + table(options.work) + match[2], text)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
