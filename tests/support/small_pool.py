"""Adapters of a model of one small module, crawled in no time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recycle_cli.settings import Settings
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest

SHAPES = {"q_proj": (6, 6)}
BASE = "org/base"


def put_adapter(
    folder: Path, seed: int, card: str = "", metadata: dict[str, str] | None = None, **config: Any
) -> Path:
    """Writes an adapter of rank 2; its weights depend on the seed, its file on the metadata too."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "base_model.model.q_proj.lora_A.weight": torch.randn(2, 6, generator=generator),
        "base_model.model.q_proj.lora_B.weight": torch.randn(6, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def crawl_pool(settings: Settings, pool: Path, bases: Iterable[str] = (BASE,)) -> None:
    """Crawls a folder for each of these base models, all of the same shapes."""
    for base in bases:
        list(crawl(CrawlRequest(folder=pool, base_model=base), settings, SHAPES))
