"""Strangers that belong in the pool, however odd what stands around their adapter."""

import json
from typing import Any

from support.strangers.draft import CARD, CONFIG, WEIGHTS, Draft
from support.strangers.kinds import PICKLE, Change, has, is_, kind

# --- cards ----------------------------------------------------------------------------------


def _card(text: str) -> Change:
    """A card of this text, whose first line is followed by the base model's name."""

    def change(draft: Draft) -> None:
        draft.files[CARD] = text.replace("BASE", draft.base_model).encode()

    return change


ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(40))])

CARDS = (
    kind("no card", "accepted", has(CARD, None)),
    kind("an empty card", "accepted", has(CARD, b"")),
    kind("no licence", "accepted", is_(license=None)),
    kind("a licence of another name", "accepted", is_(license="other")),
    kind("licences in a list", "accepted", _card("---\nlicense: [mit, apache-2.0]\n---\n")),
    kind("a licence called no", "accepted", _card("---\nlicense: no\nbase_model: BASE\n---\n")),
    kind("tags that are a number", "accepted", _card("---\nlicense: mit\ntags: 5\n---\n")),
    kind("bases in a list", "accepted", _card("---\nbase_model:\n- BASE\n- other/one\n---\n")),
    kind("a base that is an object", "accepted", _card("---\nbase_model: {a: BASE}\n---\n")),
    kind(
        "front matter that never ends", "accepted", _card("---\nlicense: mit\nbase_model: BASE\n")
    ),
    kind("front matter that is no YAML", "accepted", _card("---\nlicense: [mit\n: :\n---\n")),
    kind("front matter that is a list", "accepted", _card("---\n- license\n---\n")),
    kind("a date that is none", "accepted", _card("---\ndate: 2025-99-99\nlicense: mit\n---\n")),
    kind(
        "a tag of Python objects",
        "accepted",
        _card("---\nlicense: !!python/object/apply:os.system ['true']\n---\n"),
    ),
    kind("aliases that explode", "accepted", _card(f"---\n{ALIASES}\nlicense: mit\n---\n")),
    kind("a card that is not UTF-8", "accepted", has(CARD, b"---\nlicense: \xff\xfe\n---\n")),
    kind(
        "a card with control characters",
        "accepted",
        _card("---\nlicense: mit\n---\n\x1b[2J\x07 wiped\r\n\u202eright to left"),
    ),
    kind("a very long card", "accepted", _card("---\nlicense: mit\n---\n" + "word " * 60_000)),
)


# --- files and revisions --------------------------------------------------------------------


def _checkpoints(draft: Draft) -> None:
    """The trainer's checkpoints beside the finished adapter."""
    config = json.dumps(draft.config).encode()
    for step in (50, 100):
        folder = f"checkpoint-{step}"
        draft.files |= {f"{folder}/{CONFIG}": config, f"{folder}/{WEIGHTS}": bytes(step)}
        draft.files[f"{folder}/trainer_state.json"] = b"{}"


def _older(**fields: Any) -> Change:
    """An earlier commit whose configuration differs in these fields."""

    def change(draft: Draft) -> None:
        draft.older.append({CONFIG: json.dumps(draft.config | fields).encode()})

    return change


FILES = (
    kind("a pickle beside the weights", "accepted", has("adapter_model.bin", PICKLE)),
    kind(
        "the trainer's own files",
        "accepted",
        has("training_args.bin", PICKLE),
        has("optimizer.pt", PICKLE),
        has("tokenizer.json", b"{}"),
        has("runs/events.out.tfevents.1", b"\0" * 64),
    ),
    kind("a file in a tokenizer's place", "accepted", has("tokenizer_config.json", b"{'auto_map'")),
    kind("code beside the weights", "accepted", has("modeling_pico.py", b"raise SystemExit(1)\n")),
    kind(
        "names that lead elsewhere",
        "accepted",
        has("../../escaped.json", b"{}"),
        has("/etc/cron.d/escaped", b"{}"),
        has("..\\escaped.json", b"{}"),
    ),
    kind("checkpoints in folders", "accepted", _checkpoints),
    kind("two revisions", "accepted", _older(lora_alpha=1)),
    kind("an older revision that was refused", "accepted", _older(use_dora=True), _older(r=0)),
)
