"""The documents that there are, and how lines of JSON become them again."""

import json
from collections.abc import Iterable

from recycle_cli.errors import InputError
from recycle_cli.records.adapters import (
    AdapterDocument,
    CrawlDocument,
    DuplicatesDocument,
    ForgetDocument,
    IndexDocument,
    StatsDocument,
    VerificationDocument,
)
from recycle_cli.records.document import Document
from recycle_cli.records.evaluation import EvaluationDocument
from recycle_cli.records.merging import MergeDocument, MethodDocument
from recycle_cli.records.selection import SelectionDocument
from recycle_cli.records.study import StudyDocument, StudyPlanDocument
from recycle_cli.records.tuning import BudgetDocument, TuneDocument

DOCUMENTS: dict[str, type[Document]] = {
    document.kind: document
    for document in (
        AdapterDocument,
        CrawlDocument,
        StatsDocument,
        IndexDocument,
        DuplicatesDocument,
        VerificationDocument,
        ForgetDocument,
        SelectionDocument,
        MergeDocument,
        MethodDocument,
        TuneDocument,
        BudgetDocument,
        EvaluationDocument,
        StudyDocument,
        StudyPlanDocument,
    )
}


def read_documents(lines: Iterable[str], where: str = "standard input") -> list[Document]:
    """Parses JSON Lines. The whole input is checked before anything is returned.

    Args:
        lines: the lines of the input; blank ones are passed over.
        where: how errors name the input.

    Raises:
        InputError: a line is not a document of a known kind and major, or there is none.
    """
    documents = [
        _parse_line(line, f"{where}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not documents:
        raise InputError(
            f"{where} is empty",
            "the command before the pipe failed or found nothing; run it alone to see why",
        )
    return documents


def _parse_line(line: str, where: str) -> Document:
    hint = "feed it the output of a recycle command run with --json"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", hint) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("schema"), str):
        raise InputError(f"{where} has no schema field", hint)
    return document_class(fields["schema"], where).from_fields(fields, where)


def document_class(schema: str, where: str) -> type[Document]:
    """The model for a `schema` value such as `recycle.merge/1`.

    Raises:
        InputError: the kind is unknown, or its major is one this version cannot read.
    """
    name, _, major = schema.removeprefix("recycle.").partition("/")
    known = DOCUMENTS.get(name) if schema.startswith("recycle.") else None
    if known is None:
        raise InputError(
            f"{where} is a {schema!r}, which is no recycle document",
            f"known kinds: {', '.join(f'recycle.{kind}' for kind in DOCUMENTS)}",
        )
    if major != str(known.major):
        raise InputError(
            f"{where} is a {schema!r}; this version reads {known.schema_name()!r}",
            "use the version of recycle that wrote it",
        )
    return known
