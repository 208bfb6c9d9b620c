"""What the Hub holds, and who may see it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from support.hub.messages import Answer, Request, error
from support.hub.repository import Repository


class Refused(Exception):
    """A request that is answered with an error or a redirect."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass
class Shelves:
    """What the Hub holds, and who may see it.

    Args:
        repositories: by id, in the order in which they are listed.
        renamed: old id -> new id.
        tokens: token -> the gated and private repositories that it opens; others are invalid.
        page_size: the most entries on a page of a listing.
        hub_url, storage_url: the two origins.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    tokens: Mapping[str, Collection[str]] = field(default_factory=dict)
    page_size: int = 100
    hub_url: str = ""
    storage_url: str = ""

    def opens(self, token: str | None, repository: Repository) -> bool:
        """Whether a token was granted this gated or private repository."""
        return token is not None and repository.id in self.tokens.get(token, ())

    def shows(self, token: str | None, repository: Repository) -> bool:
        """Whether whoever has this token may know of the repository."""
        return not repository.private or self.opens(token, repository)


def find_repository(request: Request, shelves: Shelves, owner: str, name: str) -> Repository:
    """The repository, for a request that may know that it exists."""
    repo_id = f"{owner}/{name}"
    if repo_id in shelves.renamed:
        moved = request.target.replace(repo_id, shelves.renamed[repo_id], 1)
        raise Refused(Answer(307, {"Location": moved}))
    repository = shelves.repositories.get(repo_id)
    if repository is None or not shelves.shows(request.token, repository):
        # Who shows no token is not told apart from who lacks a right.
        status = 401 if request.token is None else 404
        raise Refused(error(status, "Repository not found", "RepoNotFound"))
    if repository.disabled:
        raise Refused(error(403, "Access to this resource is disabled."))
    return repository


def check_gate(request: Request, shelves: Shelves, repository: Repository) -> None:
    """Refuses the files of a gated repository to whom its gate is closed."""
    if not repository.gated or shelves.opens(request.token, repository):
        return
    status = 401 if request.token is None else 403
    message = f"Access to model {repository.id} is restricted."
    raise Refused(error(status, message, "GatedRepo"))


def find_commit(repository: Repository, revision: str) -> str:
    """The commit that a revision means."""
    sha = repository.find_commit(revision)
    if sha is None:
        raise Refused(error(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
    return sha
