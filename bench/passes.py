"""Training steps and scoring on the embedded model, beside plain PEFT and lm-eval."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bench.timing import Comparison, compare
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example, encode_examples, encode_questions, prompt_text
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.products import attached
from recycle_cli.engine.scoring import candidate_log_likelihoods
from recycle_cli.evaluation.lm_eval_task import lm_eval_config, run_lm_eval
from recycle_cli.evaluation.tasks import Row, load_task
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.lora.folder import read_adapter
from recycle_cli.settings import read_settings
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora
from recycle_cli.workflows.demo import examples_folder

ROWS, SCORED = 8, 96
POOL = ("shopfloor/gadget-mood", "cinephile/remarks", "people-ops/feedback", "press-desk/topics",
        "grammar/tense")  # fmt: skip


def comparisons() -> Iterator[Comparison]:
    """A LoRA step, a mixture step, a mixture's forward pass, and scoring."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    rows = load_task(str(examples_folder() / "tasks/hotel_reviews")).train
    examples = encode_examples(base, rows[:ROWS])
    yield _lora_step(base, examples)
    yield _mixture_pass(base, examples)
    yield _scoring(base, rows[:SCORED])


def _lora_step(base: BaseModel, examples: list[Example]) -> Comparison:
    with target_lora(base, LoraRecipe(rank=8, dropout=0.0), seed=0) as peft_model:
        batch, whole = collate(base, examples), _padded(base, examples)
        return compare(
            f"a LoRA's loss and gradient, {ROWS} rows",
            lambda: answer_loss(base, batch).backward(),
            "PEFT: whole rows, logits of every position",
            lambda: peft_model(**whole).loss.backward(),
        )


def _mixture_pass(base: BaseModel, examples: list[Example]) -> Comparison:
    folders = [examples_folder() / "pool" / name for name in POOL]
    updates = [read_adapter(folder).update for folder in folders]
    mixture = Mixture(updates, MixtureRecipe("linear", "one"), base.compute.device)
    whole = _padded(base, examples)

    def ours() -> None:
        with torch.no_grad(), attached(base, mixture.components, mixture.gates()):
            base.model(**whole)

    peft_model = _all_active(folders)

    def theirs() -> None:
        with torch.no_grad():
            peft_model(**whole)

    return compare(
        f"{len(POOL)} adapters at once, a forward pass of {ROWS} rows",
        ours,
        "PEFT with all of them active",
        theirs,
    )


def _all_active(folders: list[Path]) -> Any:
    """Another copy of the model, wrapped by PEFT with several adapters that all act."""
    first, *rest = folders
    model = load_base_model(EMBEDDED_NAME, read_settings()).model
    peft_model: Any = PeftModel.from_pretrained(model, first, adapter_name="a0")
    for number, folder in enumerate(rest, start=1):
        peft_model.load_adapter(folder, adapter_name=f"a{number}")
    peft_model.base_model.set_adapter([f"a{number}" for number in range(len(folders))])
    return peft_model.eval()


def _scoring(base: BaseModel, rows: tuple[Row, ...]) -> Comparison:
    questions = encode_questions(base, rows)
    prompts = [prompt_text(base, row.input) for row in rows]
    config = lm_eval_config("bench", prompts, rows, "acc")
    return compare(
        f"scoring {len(rows)} rows with 2 choices",
        lambda: candidate_log_likelihoods(base, questions),
        "lm-eval on the same rows, batches of 32",
        lambda: run_lm_eval(base.model, base.tokenizer, config, 32),
        turns=3,
    )


def _padded(base: BaseModel, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Whole rows, padded on the right, with labels on the answers, as transformers wants them."""
    rows = [example.prompt + example.answer for example in examples]
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), base.tokenizer.pad_token_id)
    labels = torch.full_like(tokens, -100)
    attention = torch.zeros_like(tokens)
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        attention[index, : len(row)] = 1
        labels[index, len(example.prompt) : len(row)] = torch.tensor(example.answer)
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}
