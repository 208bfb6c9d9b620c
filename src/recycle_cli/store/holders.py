"""Of several adapters with the same weights, one holds them; the others are its duplicates."""

from recycle_cli.records import AdapterDocument

DUPLICATE = "duplicate"


def held_by(holder: str) -> str:
    """What is told of an adapter whose weights another one, accepted, has too."""
    return f"its weights are byte for byte those of {holder}"


def duplicate_of(document: AdapterDocument, holder: str) -> AdapterDocument:
    """The document of an adapter whose weights another one holds.

    It is the same whenever that is found out: before the tensors are read, or after it was
    accepted itself. That it is for the base model of its pool was settled before either.
    """
    return document.model_copy(
        update={
            "status": "rejected",
            "reason": DUPLICATE,
            "detail": held_by(holder),
            "base_model": document.pool,
            "path": None,
            "norm": None,
            "fingerprint": None,
        }
    )
