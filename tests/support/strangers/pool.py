"""The pool: every kind of stranger at least once, in an order that a seed decides."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random

from safetensors.torch import load, save

from support.hub import Repository
from support.strangers.damaged import DAMAGED
from support.strangers.draft import CARD, CONFIG, WEIGHTS
from support.strangers.kinds import Kind
from support.strangers.packaging import CARDS, FILES
from support.strangers.refused import REFUSED
from support.strangers.welcome import BASE_NAMES, FIELDS, RANKS_AND_MODULES

WELCOME: tuple[Kind, ...] = (*RANKS_AND_MODULES, *BASE_NAMES, *FIELDS, *CARDS, *FILES)

BASE_MODEL = "pico-lab/Pico-Llama"
OWNERS = ("ada", "bo-lab", "cho_42", "dune.ai", "eve", "FineTunes", "gradient-den", "hal9001")
HUB_CODES = ("gated", "disabled", "not_found", "no_config")
"""The reasons that only the Hub gives: a folder on disk never has them."""


@dataclass(frozen=True)
class Stranger:
    """One repository of the pool.

    Args:
        kind: what is special about it, in words.
        repository: for a `Hub`.
        expected: `accepted`, or the code of the reason for which it is refused.
        copy_of: the id of the stranger, earlier in the pool, that has the same factors.
    """

    kind: str
    repository: Repository
    expected: str
    copy_of: str | None = None

    @property
    def id(self) -> str:
        """The id of its repository."""
        return self.repository.id


@dataclass(frozen=True)
class Pool:
    """Strangers' adapters of one base model, in the order in which they came to the Hub."""

    base_model: str
    strangers: tuple[Stranger, ...]

    @property
    def repositories(self) -> list[Repository]:
        """For a `Hub`."""
        return [stranger.repository for stranger in self.strangers]

    def of_kind(self, name: str) -> Stranger:
        """The first stranger of a kind."""
        return next(stranger for stranger in self.strangers if stranger.kind == name)

    def listed(self, *base_models: str) -> list[Stranger]:
        """Those that a listing finds by the tags of these base models and of PEFT.

        Without names, by those of the base model and of its copies.
        """
        tags = {f"base_model:adapter:{name}" for name in base_models or self._names()}
        return [
            stranger
            for stranger in self.strangers
            if tags.intersection(stranger.repository.tags)
            and stranger.repository.library_name == "peft"
            and not stranger.repository.private
        ]

    def expected(self, strangers: Iterable[Stranger] | None = None) -> dict[str, str]:
        """Id -> `accepted` or a reason, of all strangers or of some."""
        chosen = self.strangers if strangers is None else strangers
        return {stranger.id: stranger.expected for stranger in chosen}

    def counts(self, strangers: Iterable[Stranger] | None = None) -> Counter[str]:
        """How many of each, of all strangers or of some."""
        return Counter(self.expected(strangers).values())

    def _names(self) -> list[str]:
        _, _, name = self.base_model.partition("/")
        return [self.base_model, f"unsloth/{name}-bnb-4bit"]


def make_pool(count: int = 300, seed: int = 0, base_model: str = BASE_MODEL) -> Pool:
    """Strangers of every kind; what is over is filled up with more that are welcome.

    Args:
        count: how many, at least one of each kind.
        seed: of their factors, their ids and their order.
        base_model: a Hub id; the adapters have the shapes of the pico model whatever its name.

    Raises:
        ValueError: count is smaller than the number of kinds.
    """
    kinds = [*WELCOME, *REFUSED, *DAMAGED]
    more = count - len(kinds) - len(COPIES)
    if more < 0:
        raise ValueError(f"there are {len(kinds) + len(COPIES)} kinds of strangers, not {count}")
    kinds += [WELCOME[place % len(WELCOME)] for place in range(more)]
    Random(seed).shuffle(kinds)
    strangers = [_make(kind, place, seed, base_model) for place, kind in enumerate(kinds)]
    first = next(one for one in strangers if one.kind == "plain")
    places = range(len(strangers), count)
    copies = [_copy(first, name, place) for name, place in zip(COPIES, places, strict=True)]
    return Pool(base_model, (*strangers, *copies))


def _created_at(place: int) -> str:
    """A time of its own for each, so that of two copies one is the earlier."""
    created = datetime(2025, 1, 1) + timedelta(hours=place)
    return f"{created.isoformat(timespec='milliseconds')}Z"


def _make(kind: Kind, place: int, seed: int, base_model: str) -> Stranger:
    draft = kind.draft(base_model, f"{seed}/{place}")
    owner = draft.random.choice(OWNERS)
    repository = draft.finish(f"{owner}/pico-{kind.slug}-{place:03d}", _created_at(place))
    return Stranger(kind.name, repository, kind.expected)


def _under_another_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {CARD: b"---\nlicense: wtfpl\n---\nMine now.\n"}


def _in_another_file(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {WEIGHTS: save(load(files[WEIGHTS]), {"again": "yes"})}


COPIES: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "uploaded again": dict,
    "uploaded again under another card": _under_another_card,
    "the same factors in another file": _in_another_file,
}
"""What somebody did to the files of an earlier stranger."""


def _copy(first: Stranger, name: str, place: int) -> Stranger:
    newest = {path: file.content for path, file in first.repository.newest.items()}
    files = COPIES[name]({path: newest[path] for path in (CARD, CONFIG, WEIGHTS)})
    repository = Repository(
        f"copycat/{name.replace(' ', '-')}",
        files,
        first.repository.tags,
        created_at=_created_at(place),
    )
    same = files[WEIGHTS] == newest[WEIGHTS]
    return Stranger(name, repository, "duplicate" if same else "accepted", copy_of=first.id)
