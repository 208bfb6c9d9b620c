"""Trains the adapters of this folder again, from nothing, with `recycle tune`.

    python examples/pool/train.py [--out DIR] [--only NAME]...

Adapters that are already in DIR (default: this folder) are left as they are, so that an
interrupted run goes on where it stopped. The recipes differ on purpose: a pool of strangers'
adapters has mixed ranks, scales, modules, lengths of training and licences.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TASKS = HERE.parent / "tasks"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """One adapter: where it goes, what it learns, and how."""

    name: str
    task: str
    rank: int
    alpha: float
    modules: tuple[str, ...]
    license: str | None
    lr: float = 2e-3
    steps: int = 40
    rows: int = 200
    seed: int = 0
    extra: tuple[str, ...] = ()


RECIPES = (
    Recipe(
        "shopfloor/gadget-mood",
        "gadget_reviews",
        8,
        16,
        ("q_proj", "v_proj"),
        "apache-2.0",
        steps=60,
    ),
    Recipe("cinephile/remarks", "film_remarks", 2, 4, (*ATTENTION, *MLP), "mit", 1e-3, 60),
    Recipe(
        "people-ops/feedback",
        "staff_feedback",
        8,
        8,
        ("q_proj", "v_proj"),
        "apache-2.0",
        lr=1e-3,
        extra=("--rslora",),
    ),
    Recipe("press-desk/topics", "news_topics", 4, 8, ATTENTION, "cc-by-4.0"),
    Recipe("shopfloor/departments", "shop_departments", 4, 4, ("q_proj", "v_proj"), "apache-2.0"),
    Recipe("tutor/subjects", "school_subjects", 2, 4, MLP, "mit"),
    Recipe("teller/requests", "bank_requests", 4, 8, ATTENTION, "cc-by-nc-4.0"),
    Recipe(
        "helpline/phones",
        "phone_helpdesk",
        4,
        8,
        ("q_proj", "v_proj"),
        "apache-2.0",
        extra=("--rank-pattern", "v_proj=8", "--alpha-pattern", "v_proj=16"),
    ),
    Recipe("lexicon/kinds", "kinds_of_things", 2, 4, ATTENTION, "mit"),
    Recipe("lexicon/materials", "made_of", 1, 2, (*ATTENTION, *MLP), "mit", lr=3e-3),
    Recipe("grammar/tense", "sentence_tense", 4, 16, ("q_proj", "v_proj"), "cc-by-4.0", lr=1e-3),
    Recipe("grammar/number", "doer_number", 2, 2, MLP, "cc-by-4.0"),
    Recipe("diary/days", "find_day", 4, 8, ("v_proj", "o_proj"), None, steps=30),
    Recipe("diary/seasons", "event_seasons", 6, 12, ("q_proj", "v_proj"), None, steps=30),
)


def command(recipe: Recipe, out: Path) -> list[str]:
    """The command line that trains one adapter."""
    words = [sys.executable, "-m", "recycle_cli", "tune", "--method", "lora"]
    words += ["--task", str(TASKS / recipe.task), "--out", str(out / recipe.name)]
    words += ["--rank", str(recipe.rank), "--alpha", f"{recipe.alpha:g}", "--dropout", "0"]
    for module in recipe.modules:
        words += ["--target-module", module]
    words += ["--rows", str(recipe.rows), "--steps", str(recipe.steps), "--lr", f"{recipe.lr:g}"]
    words += ["--eval-every", "20", "--seed", str(recipe.seed), "--save-dtype", "bfloat16"]
    words += ["--license", recipe.license] if recipe.license else []
    return [*words, *recipe.extra]


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", action="append", choices=[recipe.name for recipe in RECIPES])
    options = parser.parse_args()
    for recipe in RECIPES:
        wanted = options.only is None or recipe.name in options.only
        if wanted and not (options.out / recipe.name).exists():
            print(recipe.name, flush=True)
            subprocess.run(command(recipe, options.out), check=True)
            # What a stranger uploads is a PEFT folder with a card, not recycle's own record.
            (options.out / recipe.name / "recycle.json").unlink()


if __name__ == "__main__":
    main()
