"""`recycle demo`."""

import typer


def demo(context: typer.Context) -> None:
    """Run the whole pipeline."""
