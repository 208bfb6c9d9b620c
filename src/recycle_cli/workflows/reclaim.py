"""Removing kept folders that no row of the index names."""

from collections.abc import Iterable
from pathlib import Path

from recycle_cli.records import AdapterDocument
from recycle_cli.store.catalog import Catalog


def rows_of(folder: Path, catalog: Catalog) -> list[AdapterDocument]:
    """The rows that a kept folder belongs to."""
    return [row for row in catalog.kept(folder.name[:64]) if row.path == str(folder)]


def reclaim(folders: Iterable[Path], adapters_folder: Path, catalog: Catalog) -> list[str]:
    """Removes those of some folders of the cache that belong to nobody; says which cannot be."""
    from recycle_cli.store.cache import remove

    problems = []
    for folder in folders:
        # A crawl may have brought it back meanwhile.
        if folder.parent != adapters_folder or rows_of(folder, catalog):
            continue
        try:
            remove(folder.parent, folder.name)
        except OSError as error:
            problems.append(str(error))
    return problems
