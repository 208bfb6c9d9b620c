"""`recycle index verify`: whether every kept adapter is whole, and mending those that are not."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from recycle_cli.errors import GateNotMet, RecycleError
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import AdapterDocument, DamagedAdapter, VerificationDocument
from recycle_cli.settings import Settings
from recycle_cli.workflows.index import DAMAGED, MISSING, facts_in, open_index


def verify_index(
    settings: Settings, repair: bool = False, progress: Progress | None = None
) -> VerificationDocument:
    """Reads every kept adapter, superseded ones too, and compares it with its sha256 and rules.

    The index stays as it is.

    Args:
        settings: where the index and the cache are.
        repair: fetch what is damaged or missing again, from where it was found.
        progress: told of each adapter.

    Raises:
        RecycleError: the index cannot be used.
    """
    started = time.monotonic()
    progress = progress or Silent()
    with open_index(settings) as catalog:
        kept = list({row.path: row for row in reversed(catalog.kept())}.values())[::-1]
    progress.stage("verifying adapters", len(kept))
    size, damaged = 0, []
    for row in kept:
        size += _weights_size(row)
        finding = _finding(row)
        if finding is not None and repair:
            finding = _repaired(finding, row, settings)
        if finding is not None:
            damaged.append(finding)
        progress.advance(f"{row.id}: {_word(finding)}")
    return VerificationDocument(
        adapters=len(kept),
        bytes=size,
        damaged=damaged,
        whole=all(finding.repaired for finding in damaged),
        elapsed_s=time.monotonic() - started,
    )


def check_whole(document: VerificationDocument) -> None:
    """Asks whether every adapter is whole now.

    Raises:
        GateNotMet: one is not.
    """
    broken = [one for one in document.damaged if not one.repaired]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise GateNotMet(
            f"adapter {broken[0].id!r}{more} of {document.adapters} cannot be used: "
            f"{broken[0].problem}, {broken[0].detail}",
            "fetch it again with recycle index verify --repair, or let it go with "
            "recycle index forget",
        )


def _finding(row: AdapterDocument) -> DamagedAdapter | None:
    from recycle_cli.store.cache import damage

    folder = Path(row.path or "")
    gone = not folder.is_dir()
    detail = f"its folder {folder} has gone" if gone else damage(folder) or _other_update(row)
    if detail is None:
        return None
    return DamagedAdapter(
        id=row.id,
        revision=row.revision,
        sha256=row.sha256 or "",
        path=str(folder),
        problem=MISSING if gone else DAMAGED,
        detail=detail,
    )


def _other_update(row: AdapterDocument) -> str | None:
    """What is wrong with the configuration of a kept adapter: that its weights make another update
    with it than they did when it was vetted."""
    if row.fingerprint is None or facts_in(Path(row.path or "")).fingerprint == row.fingerprint:
        return None
    return "its configuration makes another update of its weights than the one that was vetted"


def _repaired(finding: DamagedAdapter, row: AdapterDocument, settings: Settings) -> DamagedAdapter:
    from recycle_cli.workflows.crawl_keep import fetch_again

    try:
        with _out_of_the_way(Path(finding.path)):
            fetch_again(row, settings)
            again = _finding(row)
            if again is not None:
                raise RecycleError(f"fetched again, it is {again.problem}: {again.detail}", "")
    except (RecycleError, OSError) as error:
        detail = f"{finding.detail}; not repaired: {error}"
        return finding.model_copy(update={"detail": detail})
    return finding.model_copy(update={"repaired": True})


@contextlib.contextmanager
def _out_of_the_way(folder: Path) -> Iterator[None]:
    """Moves a damaged folder aside, and back where nothing better took its place."""
    from recycle_cli.store.unfinished import unfinished_folder

    if not folder.exists():
        yield
        return
    with unfinished_folder(folder.parent) as aside:
        old = folder.rename(aside / folder.name)
        try:
            yield
        finally:
            if not folder.exists():
                old.rename(folder)


def _weights_size(row: AdapterDocument) -> int:
    from recycle_cli.lora.folder import WEIGHTS_FILE

    try:
        return (Path(row.path or "") / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0


def _word(finding: DamagedAdapter | None) -> str:
    if finding is None:
        return "whole"
    return "repaired" if finding.repaired else finding.problem
