"""How long-running work tells the outside how far it is. Nothing here prints."""

from typing import Protocol


class Progress(Protocol):
    """What a workflow reports to while it works."""

    def stage(self, title: str, total: int | None = None) -> None:
        """A new stage begins; `total` counts its steps where that is known."""

    def advance(self, note: str = "") -> None:
        """One more step of the stage is done; `note` is its latest figure, as in `loss 0.412`."""

    def message(self, text: str) -> None:
        """Something worth saying that is no step."""

    def detail(self, text: str) -> None:
        """Something for those who want to know more."""


class Silent:
    """A progress that goes nowhere."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Says nothing."""

    def advance(self, note: str = "") -> None:
        """Says nothing."""

    def message(self, text: str) -> None:
        """Says nothing."""

    def detail(self, text: str) -> None:
        """Says nothing."""
