"""Writes documents.md, the reference of the JSON documents, from the models in records, the
rules in merge.md from the merging catalog, the presets in tune.md from the tuning catalog, and the
checks in crawl.md from those that vetting runs."""

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recycle_cli import records
from recycle_cli.lora.config import UNSUPPORTED
from recycle_cli.merging.catalog import METHODS, WEIGHT_USES, MergeMethod
from recycle_cli.selection import catalog as selection
from recycle_cli.store.vetting import CHECKS
from recycle_cli.tuning import catalog as tuning

PAGE = Path(__file__).with_name("documents.md")
MERGE_PAGE = Path(__file__).with_name("merge.md")
TUNE_PAGE = Path(__file__).with_name("tune.md")
CRAWL_PAGE = Path(__file__).with_name("crawl.md")
RULES = re.compile(r"(<!-- rules:start -->\n).*(<!-- rules:end -->)", re.DOTALL)
PRESETS = re.compile(r"(<!-- presets:start -->\n).*(<!-- presets:end -->)", re.DOTALL)
SELECT_PAGE = Path(__file__).with_name("select.md")
LISTED = re.compile(r"(<!-- methods:start -->\n).*(<!-- methods:end -->)", re.DOTALL)
NEEDS = {
    "nothing": "-",
    "index": "the index",
    "target": "`--target`",
    "gradient": "one pass of the model",
    "rows": "a pass for each adapter",
}
CHECKED = re.compile(r"(<!-- checks:start -->\n).*(<!-- checks:end -->)", re.DOTALL)
FEATURES = re.compile(r"(<!-- features:start -->\n).*(<!-- features:end -->)", re.DOTALL)
HEAD = """\
# JSON documents

With `--json`, a command prints one document a line; its first field is `schema`, as in
`recycle.merge/1`. Fields may be added under the same number: ignore those you do not know, and
refuse a number that you do not know, as recycle itself does. `merge`, `tune` and `demo` also keep
their document as `recycle.json` in what they write.

This page is written by `make docs`.
"""


def page() -> str:
    """The whole page."""
    kinds = [_section(document.schema_name(), document) for document in records.DOCUMENTS.values()]
    parts = [_section(name, part) for name, part in sorted(_parts().items())]
    return "\n".join([HEAD, *kinds, "## Parts\n", *(text.replace("## ", "### ") for text in parts)])


def _parts() -> dict[str, type[records.Part]]:
    """The models that stand inside documents."""
    found: dict[str, type[records.Part]] = {}
    waiting: list[type[records.Part]] = list(records.DOCUMENTS.values())
    while waiting:
        for field in waiting.pop().model_fields.values():
            for part in _models_in(field.annotation):
                if part.__name__ not in found:
                    found[part.__name__] = part
                    waiting.append(part)
    return found


def _models_in(annotation: Any) -> list[type[records.Part]]:
    if isinstance(annotation, type) and issubclass(annotation, records.Part):
        return [annotation]
    return [part for inner in typing.get_args(annotation) for part in _models_in(inner)]


def _section(title: str, model: type[records.Part]) -> str:
    text = re.sub(
        r"\s*\n\s*\n\s*", "\n\n", re.sub(r"(?<!\n)\n {4}(?!\n)", " ", model.__doc__ or "")
    )
    rows = [
        f"| `{name}` | {_type(field.annotation)} |" for name, field in model.model_fields.items()
    ]
    return "\n".join(
        [f"## {title}", "", text.strip(), "", "| field | type |", "|---|---|", *rows, ""]
    )


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f'`"{value}"`' for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(one) for one in inner)}]"
    if origin is dict:
        return f"object of {_type(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, records.Part):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "null" if annotation is type(None) else "any")


def merge_page() -> str:
    """The page on merging, with its rules as the catalog has them."""
    rules = "\n".join(_rule(method) for method in METHODS.values())
    text = MERGE_PAGE.read_text(encoding="utf-8")
    return RULES.sub(lambda match: match[1] + rules + match[2], text)


def _rule(method: MergeMethod) -> str:
    """A section on one rule: two sentences, a formula, and what holds for it."""
    summary = method.summary[0].upper() + method.summary[1:]
    facts = [
        method.paper,
        f"weights {WEIGHT_USES[method.weights]}",
        *(f"`{p.option}` {_default(method, p.name)} ({p.range})" for p in method.parameters),
        "the same for any factors of an update"
        if method.invariant
        else "depends on how an update is split into factors",
        _alone(method),
    ]
    return f"### {method.name}\n\n{summary}. {method.detail}\n\n    {method.formula}\n\n" + (
        f"{'; '.join(facts)}.\n"
    )


def _default(method: MergeMethod, name: str) -> str:
    value = method.defaults[name]
    return "chosen by the rule" if value is None else f"{value}"


def _alone(method: MergeMethod) -> str:
    if method.lossless is None:
        return "changes even a single adapter"
    at = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in method.lossless.items())
    return "a single adapter comes back as it is" + (f" with `{at}`" if at else "")


def tune_page() -> str:
    """The page on tuning, with its presets as the catalog has them."""
    presets = "\n".join(_preset(method) for method in tuning.METHODS.values())
    text = TUNE_PAGE.read_text(encoding="utf-8")
    return PRESETS.sub(lambda match: match[1] + presets + match[2], text)


def _preset(method: tuning.TuningMethod) -> str:
    """A section on one preset: what it learns, its formula, and its settings."""
    summary = method.summary[0].upper() + method.summary[1:]
    usual = vars(tuning.Pace())
    pace = {k: v for k, v in vars(method.pace).items() if v != usual[k] or k in ("lr", "steps")}
    settings = {**method.defaults, **pace}
    if settings.get("optimizer") == tuning.NGOPT:
        del settings["lr"]
    else:
        settings.pop("bound", None)
    told = ", ".join(f"`{_setting(name, value)}`" for name, value in settings.items())
    return (
        f"### {method.name}\n\n{summary}. {method.detail}\n\n    {method.formula}\n\n"
        f"{method.paper}; {told}.\n"
    )


def _setting(name: str, value: Any) -> str:
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return option if value else f"--no-{option.removeprefix('--')}"
    return f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"


def crawl_page() -> str:
    """The page on crawling, with the checks as vetting runs them."""
    features = {feature.code for feature in UNSUPPORTED.values()}
    rows = ["| check | what it asks | reasons |", "|---|---|---|"]
    for check in CHECKS:
        codes = [f"`{code}`" for code in check.codes if code not in features]
        more = ["a feature below"] * (len(codes) < len(check.codes))
        rows.append(f"| {check.name} | {check.sentence} | {', '.join([*codes, *more])} |")
    refused = ["| in `adapter_config.json` | reason | because |", "|---|---|---|"]
    refused += [f"| `{name}` | `{one.code}` | {one.reason} |" for name, one in UNSUPPORTED.items()]
    text = CRAWL_PAGE.read_text(encoding="utf-8")
    text = _filled(CHECKED, text, rows)
    return _filled(FEATURES, text, refused)


def select_page() -> str:
    """The page on selecting, with the methods as the catalog has them."""
    rows = ["| method | ranks by | score | needs | from |", "|---|---|---|---|---|"]
    for one in selection.METHODS.values():
        score = one.formula.replace("|", "\\|")
        rows.append(
            f"| `{one.name}` | {one.summary}. {one.detail} | {score} | {NEEDS[one.needs]} | "
            f"{one.paper or 'ours'} |"
        )
    return _filled(LISTED, SELECT_PAGE.read_text(encoding="utf-8"), rows)


def _filled(marks: re.Pattern[str], text: str, lines: Sequence[str]) -> str:
    table = "\n".join(lines) + "\n"
    return marks.sub(lambda match: match[1] + table + match[2], text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    MERGE_PAGE.write_text(merge_page(), encoding="utf-8")
    TUNE_PAGE.write_text(tune_page(), encoding="utf-8")
    CRAWL_PAGE.write_text(crawl_page(), encoding="utf-8")
    SELECT_PAGE.write_text(select_page(), encoding="utf-8")
