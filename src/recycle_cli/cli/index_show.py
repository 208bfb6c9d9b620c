"""How `recycle index show` tells people of one adapter."""

from typing import TYPE_CHECKING

from recycle_cli.cli.output import Output

if TYPE_CHECKING:
    from recycle_cli.records import ModuleNorm, ShownAdapterDocument

CARD_LINES = 12
CARD_WIDTH = 160
APART = {"modules", "card", "others", "rank"}


def print_adapter(row: "ShownAdapterDocument", output: Output) -> None:
    """Its fields, its modules by the last part of their names, its card's start, other rows."""
    fields = [(name, _told(value)) for name, value in dict(row).items() if name not in APART]
    if row.rank is not None:
        fields.append(("rank", f"{row.rank.min} to {row.rank.max}"))
    output.table(row.id, ["field", "value"], fields)
    if row.modules:
        _print_modules(row.modules, output)
    if row.others:
        output.table(
            "other revisions and base models",
            ["revision", "vetted for", "status", "reason"],
            [(one.revision, one.pool, one.status, one.reason) for one in row.others],
        )
    _print_card(row.card, output)


def _told(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _print_modules(modules: "dict[str, ModuleNorm]", output: Output) -> None:
    groups: dict[str, list[ModuleNorm]] = {}
    for path, facts in modules.items():
        groups.setdefault(path.rpartition(".")[2], []).append(facts)
    output.table(
        f"{len(modules)} modules",
        ["module", "of them", "rank", "smallest norm", "largest norm"],
        [
            (
                name,
                len(group),
                _span([facts.rank for facts in group]),
                min(facts.norm for facts in group),
                max(facts.norm for facts in group),
            )
            for name, group in groups.items()
        ],
    )


def _span(ranks: list[int]) -> str:
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least} to {most}"


def _print_card(card: str, output: Output) -> None:
    """The first lines after the front matter."""
    from recycle_cli.store.text import clean_text

    lines = card.splitlines()
    if lines and lines[0].rstrip() == "---":
        ends = [n for n, line in enumerate(lines) if n and line.rstrip() == "---"]
        lines = lines[ends[0] + 1 :] if ends else lines
    told = [line.replace("\t", " ") for line in lines if line.strip()]
    if told:
        output.text("model card")
    for line in told[:CARD_LINES]:
        output.text(f"  {clean_text(line, CARD_WIDTH)}")
    if len(told) > CARD_LINES:
        output.text(f"  ... {len(told) - CARD_LINES} more lines: --json has them")
