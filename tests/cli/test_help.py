"""Help answers in a blink: nothing heavy is imported for it."""

import re
import subprocess
import sys
import time

import pytest
import typer.main
from typer.testing import CliRunner

from recycle_cli.cli.app import app

COMMANDS = ("", "crawl", "index", "index list", "index show", "index stats", "index duplicates",
            "index verify", "index forget", "select", "merge", "tune", "eval",
            "study", "study report", "demo")  # fmt: skip
# Not pydantic, which typer itself loads as soon as it converts an option.
HEAVY = {
    "datasets", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "nevergrad", "numpy", "peft",
    "pytorch_optimizer", "ray", "safetensors", "scipy", "torch", "transformers",
}  # fmt: skip
IN_A_FRESH_PROCESS = """
import sys
from typer.testing import CliRunner
from recycle_cli.cli.app import app
for line in {commands!r}:
    result = CliRunner().invoke(app, [*line.split(), "--help"])
    assert result.exit_code == 0, line
    print(line, sorted({heavy!r} & set(sys.modules)), sep=": ")
"""


def test_no_help_loads_a_heavy_module() -> None:
    script = IN_A_FRESH_PROCESS.format(commands=COMMANDS, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{line}: []" for line in COMMANDS]


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("line", ["", "tune"])
def test_help_takes_less_than_three_times_the_import_of_typer_and_rich(line: str) -> None:
    pairs = [
        (seconds("-m", "recycle_cli", *line.split(), "--help"), seconds("-c", "import typer, rich"))
        for _ in range(5)
    ]
    assert min(ours for ours, _ in pairs) < 3 * min(theirs for _, theirs in pairs)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_and_option_says_what_it_does(line: str) -> None:
    command = typer.main.get_command(app)
    for word in line.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    assert command.help
    for parameter in command.params:
        described = getattr(parameter, "help", None) or parameter.name == "help"
        assert described, f"{line} {parameter.name}"
    assert CliRunner().invoke(app, [*line.split(), "--help"]).exit_code == 0


def test_help_is_the_same_whichever_way_it_is_reached() -> None:
    for line in ("", "tune", "index", "index show"):
        words = [*line.split(), "--help"]
        direct = subprocess.run(
            [sys.executable, "-m", "recycle_cli", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        usual = CliRunner().invoke(app, words, prog_name="recycle")
        # The widths differ, and with them where lines are broken and summaries are cut.
        assert direct.stdout.splitlines()[0] == usual.stdout.splitlines()[0]
        assert re.findall("--[a-z-]+", direct.stdout) == re.findall("--[a-z-]+", usual.stdout)


def test_an_unknown_command_or_option_ends_with_2() -> None:
    for line in (["mrege"], ["merge", "--wieghts=1"], ["select", "-k", "none"]):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
