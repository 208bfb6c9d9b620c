"""What is known of an update, read from its factors one module at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from recycle_cli.lora.fingerprint import projections_of
from recycle_cli.lora.norm import fingerprint, squared_norm, total_norm
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.store.details import ModuleFacts


@dataclass(frozen=True)
class UpdateFacts:
    """What is known of an update.

    Args:
        modules: module path -> its facts, sorted by path.
    """

    modules: Mapping[str, ModuleFacts]

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole update."""
        return total_norm(self._norms)

    @property
    def fingerprint(self) -> str:
        """See `lora.norm.fingerprint`."""
        ranks = {module: facts.rank for module, facts in self.modules.items()}
        return fingerprint(ranks, self._norms)

    @property
    def _norms(self) -> dict[str, float]:
        return {module: facts.norm for module, facts in self.modules.items()}


def facts_of(update: ModelUpdate) -> UpdateFacts | None:
    """The facts of an update; None where a factor holds a NaN or an infinity.

    Args:
        update: modules are asked for one at a time, each once, and no longer held than that.
    """
    modules: dict[str, ModuleFacts] = {}
    for module in sorted(update):
        facts = _facts_of(update[module])
        if facts is None:
            return None
        modules[module] = facts
    return UpdateFacts(modules)


def _facts_of(piece: LowRankUpdate) -> ModuleFacts | None:
    if not (piece.A.isfinite().all() and piece.B.isfinite().all()):
        return None
    return ModuleFacts(piece.rank, math.sqrt(squared_norm(piece)), projections_of(piece))
