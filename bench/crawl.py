"""Crawling strangers' adapters from a stand-in Hub on this machine, beside the way of the authors
of arXiv 2602.12323: every configuration through PEFT, every weights file whole before any check.

The adapters have the ranks and modules of a realistic pool, at the shapes of a two-layer model; a
third of them cannot be used, most for what their configuration says.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from subprocess import Popen
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

HEADER = (
    "| what | adapters | accepted | requests to the Hub | for an accepted one | for a refused one "
    "| to its storage | takes | peak memory |\n|---|---|---|---|---|---|---|---|---|"
)
TESTS = Path(__file__).parent.parent / "tests"
BASE_MODEL = "pico-lab/Pico-Llama"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = {8: 29, 16: 30, 32: 14, 64: 21, 128: 4, 256: 2}
MODULES = {SEVEN: 80, ("q_proj", "v_proj"): 12, SEVEN[:4]: 8}
REFUSED: tuple[Mapping[str, Any], ...] = (
    {"task_type": "SEQ_CLS"},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"base_model_name_or_path": "other/model"},
    {"peft_type": "LOHA"},
    {"r": 4},  # which the tensors do not have, so that the header has to be asked
)
LARGE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LARGE_ONES = 16
SCRIPT = """
import sys
from bench.crawl import crawl_as_the_authors
crawl_as_the_authors(sys.argv[1])
"""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    cells: Sequence[str]

    def row(self) -> str:
        """As Markdown."""
        return f"| {' | '.join(self.cells)} |"


def comparisons() -> Iterator[Row]:
    """250 and 1,000 adapters: first and second crawl, a look at the index, the authors' way."""
    for count in (250, 1000):
        with TemporaryDirectory() as name, _hub(count, Path(name)) as hub:
            crawl = ("crawl", "hub", "--base-model", BASE_MODEL, "--json")
            index = ("index", "list", "--min-rank", "16", "--sort", "-norm", "--json")
            run = _Run(hub, Path(name), count)
            yield run.row("recycle crawl", ("-m", "recycle_cli", *crawl))
            yield run.row("the same again", ("-m", "recycle_cli", *crawl))
            yield run.row("recycle index list", ("-m", "recycle_cli", *index))
            yield run.row("the authors' way", ("-c", SCRIPT, BASE_MODEL))
    yield _large()


def _large() -> Row:
    """Adapters whose weights are most of the memory that there is to save."""
    with TemporaryDirectory() as name, _large_hub(Path(name)) as hub:
        run = _Run(hub, Path(name), LARGE_ONES)
        words = ("-m", "recycle_cli", "crawl", "hub", "--base-model", BASE_MODEL, "--json")
        return run.row("recycle crawl, of 84 MB each", words)


def _large_hub(folder: Path) -> Any:
    """A stand-in Hub with adapters of rank 128 for the layers of a model of a billion numbers."""
    sys.path.insert(0, str(TESTS))
    from support.hub import Hub, Repository
    from support.strangers.draft import Draft

    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(LARGE))
    shapes = {name: one for name, one in _shapes(str(folder / "base")).items() if "layers" in name}
    import torch

    def repository(number: int) -> Repository:
        draft = Draft(BASE_MODEL, Random(f"large/{number}"), shapes=shapes, dtype=torch.bfloat16)
        draft.config |= {"r": 128, "lora_alpha": 1}
        draft.adapt(*SEVEN)
        return draft.finish(f"lab/large-{number}", f"2000-01-{number + 1:02d}T00:00:00.000Z")

    base = Repository.from_folder(BASE_MODEL, folder / "base")
    return Hub([base, *map(repository, range(LARGE_ONES))])


def _hub(count: int, folder: Path) -> Any:
    """A stand-in Hub with the base model and so many adapters of it."""
    # The stand-in serves the tests; the bench has no need of another one.
    sys.path.insert(0, str(TESTS))
    from support.hub import Hub, Repository
    from support.pico import write_model

    base = Repository.from_folder(BASE_MODEL, write_model(folder / "base"))
    return Hub([base, *(_repository(number) for number in range(count))], page_size=1000)


def _repository(number: int) -> Any:
    from support.strangers.draft import Draft

    random = Random(f"crawl/{number}")
    draft = Draft(BASE_MODEL, random)
    (rank,) = random.choices(list(RANKS), list(RANKS.values()))
    (modules,) = random.choices(list(MODULES), list(MODULES.values()))
    draft.config |= {"r": rank, "lora_alpha": 2 * rank}
    draft.adapt(*modules)
    if number % 3 == 2:
        draft.config |= random.choice(REFUSED)
    return draft.finish(
        f"lab-{number % 40}/adapter-{number}", f"{2000 + number % 25}-01-01T00:00:00.000Z"
    )


@dataclass(frozen=True)
class _Run:
    hub: Any
    folder: Path
    count: int

    def row(self, what: str, words: Sequence[str]) -> Row:
        """Runs a command against the Hub."""
        self.hub.reset_log()
        environment = {
            **self.hub.environment,
            "RECYCLE_HOME": str(self.folder / "home"),
            "HF_HOME": str(self.folder / "hf"),
        }
        seconds, peak, lines = _measure([sys.executable, *words], environment)
        adapters = [json.loads(line) for line in lines if '"status"' in line]
        accepted = {one["id"] for one in adapters if one["status"] == "accepted"}
        refused = {one["id"] for one in adapters} - accepted
        counts = self.hub.counts
        asked = sum(counts.values()) - counts["storage"]
        return Row(
            (
                what,
                f"{self.count:,}",
                f"{len(accepted):,}",
                f"{asked:,}",
                self._each(accepted) if asked else "-",
                self._each(refused) if asked else "-",
                f"{counts['storage']:,}",
                f"{seconds:.1f} s",
                f"{peak / 1e6:,.0f} MB",
            )
        )

    def _each(self, ids: set[str]) -> str:
        """Requests to the Hub for one of these, in the mean."""
        paths = [request.path for request in self.hub.requests if request.origin == "hub"]
        names = ["/".join(path.removeprefix("/api/models").split("/")[1:3]) for path in paths]
        return f"{sum(name in ids for name in names) / max(1, len(ids)):.2f}"


def _measure(words: list[str], environment: Mapping[str, str]) -> tuple[float, int, list[str]]:
    """Seconds, peak bytes and lines of stdout of a process of its own."""
    start, peak = time.perf_counter(), 0
    with TemporaryFile("w+", encoding="utf-8") as stdout:
        process = Popen(words, env=environment, stdout=stdout)
        # What the kernel tells in the end counts the parent's memory too, from before the exec.
        while process.poll() is None:
            with suppress(OSError, StopIteration):
                peak = max(peak, _high_water(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
        stdout.seek(0)
        return seconds, peak, stdout.read().splitlines()


def _high_water(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def crawl_as_the_authors(base_model: str) -> None:
    """Prints a line for each adapter, as `recycle crawl --json` does."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    shapes = _shapes(base_model)
    listed = HfApi().list_models(filter=[f"base_model:adapter:{base_model}", "peft"], full=True)
    with ThreadPoolExecutor(16) as pool:
        for repository, good in pool.map(lambda one: (one, _is_good(one, shapes)), listed):
            print(json.dumps({"id": repository.id, "status": "accepted" if good else "rejected"}))


def _shapes(base_model: str) -> dict[str, tuple[int, int]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model))
    named = {
        name: module for name, module in model.named_modules() if hasattr(module, "in_features")
    }
    return {name: (module.out_features, module.in_features) for name, module in named.items()}


def _is_good(repository: Any, shapes: Mapping[str, tuple[int, int]]) -> bool:
    from huggingface_hub import hf_hub_download
    from peft import PeftConfig
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    try:
        config: Any = PeftConfig.from_pretrained(repository.id)
        if not _is_plain(config) or name not in [file.rfilename for file in repository.siblings]:
            return False
        tensors = load_file(hf_hub_download(repository.id, name))
    except Exception:  # as theirs: whatever fails is left out
        return False
    total = 0.0
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if b is None or (b.shape[0], a.shape[1]) != shapes.get(module) or a.shape[0] != config.r:
            return False
        if not (a.isfinite().all() and b.isfinite().all()):
            return False
        total += float((b.float() @ a.float()).square().sum())
    return bool(1 < config.lora_alpha / config.r * total**0.5 <= 1000)


def _is_plain(config: Any) -> bool:
    plain: list[Callable[[Any], object]] = [
        lambda c: str(getattr(c.peft_type, "value", c.peft_type)) == "LORA",
        lambda c: str(getattr(c.task_type, "value", c.task_type)) == "CAUSAL_LM",
        lambda c: BASE_MODEL.lower().split("/")[1] in (c.base_model_name_or_path or "").lower(),
        lambda c: not c.use_dora and c.bias == "none" and not c.modules_to_save,
        lambda c: not c.rank_pattern and not c.alpha_pattern and not c.trainable_token_indices,
    ]
    return all(bool(check(config)) for check in plain)
