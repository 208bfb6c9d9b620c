"""Documents of `crawl` and `index`."""

from typing import ClassVar, Literal

from pydantic import Field

from recycle_cli.records.document import AdapterRef, Document, Part, RankRange

AdapterStatus = Literal["accepted", "rejected", "failed"]


class AdapterDocument(Document):
    """One adapter that a crawl looked at. `path` is null unless it was accepted.

    `pool` is the base model that it was vetted for, `base_model` the one that it names; `origin` is
    where it was found, a folder or a repository of the Hub. `norm` is the Frobenius norm of the
    whole update, sqrt(sum over modules of |s B A|^2). `author`, `likes`, `created_at`,
    `last_modified` and `tags` are the Hub's word.
    """

    kind: ClassVar[str] = "adapter"

    id: str
    source: Literal["hub", "folder"]
    origin: str
    revision: str | None = None
    sha256: str | None = None
    path: str | None = None
    status: AdapterStatus
    reason: str | None = None
    detail: str | None = None
    base_model: str | None = None
    rank: RankRange | None = None
    alpha: float | None = None
    use_rslora: bool | None = None
    target_modules: list[str] = Field(default_factory=list)
    license: str | None = None
    size_bytes: int | None = None
    norm: float | None = None
    fingerprint: str | None = None
    downloads: int | None = None
    pool: str | None = None
    author: str | None = None
    likes: int | None = None
    created_at: str | None = None
    last_modified: str | None = None
    tags: list[str] = Field(default_factory=list)


class CrawlDocument(Document):
    """What a crawl did, counted: `counts` by status, `reasons` by reason code.

    `requests` went to the Hub itself, whose rate limit counts them, `storage_requests` to where it
    redirects to; `bytes` were read; `passed_over` entries of listings name no repository or no
    commit. A dry run of the Hub tells what keeping the accepted adapters would take:
    `requests_to_come`, `bytes_to_come`, and `rate_limited_s`, the least time that the Hub's rate
    limit would have it wait.
    """

    kind: ClassVar[str] = "crawl"

    source: str
    base_model: str
    counts: dict[str, int]
    reasons: dict[str, int]
    requests: int
    bytes: int
    elapsed_s: float
    storage_requests: int = 0
    passed_over: int = 0
    requests_to_come: int | None = None
    bytes_to_come: int | None = None
    rate_limited_s: int | None = None


class ModuleNorm(Part):
    """One module of an adapter: its rank, and the Frobenius norm of its update."""

    rank: int
    norm: float


class OtherRow(Part):
    """Another row of the same adapter: another revision, or another base model that it was vetted
    for."""

    revision: str | None = None
    pool: str | None = None
    status: AdapterStatus
    reason: str | None = None
    sha256: str | None = None


class ShownAdapterDocument(AdapterDocument):
    """An adapter with what `index list` leaves out: `modules` by path, the text of its model card,
    and its other rows, the latest first."""

    modules: dict[str, ModuleNorm] = Field(default_factory=dict)
    card: str = ""
    others: list[OtherRow] = Field(default_factory=list)


class FunnelStep(Part):
    """How many adapters a reason kept out, and how many were left after it."""

    reason: str
    adapters: int
    left: int


class StatsDocument(Document):
    """The pool in figures. The histograms count accepted adapters.

    An adapter counts once for each base model that it was vetted for, in its latest revision.
    `funnel` leads from `found` to `adapters` by the reasons in the order of the checks, failures
    last. `alpha_over_rank` goes by the largest rank. `size_bytes` is what the weights take on disk.
    """

    kind: ClassVar[str] = "stats"

    adapters: int
    counts: dict[str, int]
    reasons: dict[str, int]
    found: int = 0
    funnel: list[FunnelStep] = Field(default_factory=list)
    base_models: dict[str, int]
    ranks: dict[str, int]
    alpha_over_rank: dict[str, int] = Field(default_factory=dict)
    licenses: dict[str, int]
    target_modules: dict[str, int]
    size_bytes: int
    norm: dict[str, float] | None = None


class IndexDocument(Document):
    """What bringing the index up to date did."""

    kind: ClassVar[str] = "index"

    adapters: int
    updated: int
    missing: list[str]
    elapsed_s: float


class Duplicate(Part):
    """A member of a group of duplicates; `cosine` compares its update with that of the first."""

    id: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    path: str | None = None
    status: AdapterStatus
    license: str | None = None
    downloads: int | None = None
    norm: float | None = None
    cosine: float


class DuplicatesDocument(Document):
    """A group of adapters that are the same or nearly so, the one to keep first.

    `relation` is `identical` (the same weights file), `same_update` (other files, the same update
    of the same ranks, as far as their projections tell) or `near` (each has a cosine of at least
    `threshold` with another one of the group). Adapters of a group stand in the groups of a weaker
    relation by their first alone. `base_model` is null where that is not known.
    """

    kind: ClassVar[str] = "duplicates"

    relation: Literal["identical", "same_update", "near"]
    base_model: str | None = None
    threshold: float
    adapters: list[Duplicate]


class DamagedAdapter(AdapterRef):
    """A kept adapter whose folder is `missing` or `damaged`, and how; `repaired` where it was
    fetched again."""

    problem: Literal["missing", "damaged"]
    detail: str
    repaired: bool = False


class VerificationDocument(Document):
    """The state of the adapter cache. `adapters` counts the kept weights, each once, and `bytes`
    what was read of them; `whole` says that none is damaged any more."""

    kind: ClassVar[str] = "verification"

    adapters: int
    bytes: int
    damaged: list[DamagedAdapter]
    whole: bool
    elapsed_s: float


class ForgottenAdapter(Part):
    """A row that was removed from the index; `bytes` were freed on disk, 0 where its weights are
    kept for another row."""

    id: str
    source: str
    revision: str | None = None
    pool: str | None = None
    sha256: str | None = None
    path: str | None = None
    bytes: int


class ForgetDocument(Document):
    """What was forgotten, or what would be, where `dry_run` is true."""

    kind: ClassVar[str] = "forget"

    adapters: list[ForgottenAdapter]
    bytes: int
    dry_run: bool
