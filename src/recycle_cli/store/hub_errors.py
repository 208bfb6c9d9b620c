"""What can go wrong with the Hub, and what the errors of its client mean for an adapter."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from recycle_cli.lora.config import AdapterProblem

Read = TypeVar("Read")
ATTEMPTS = 3
NO_SUCH_FILE = "no_such_file"


class Unreachable(OSError):
    """The Hub did not answer as it should; another time it may."""

    code = "unreachable"


class Broken(Unreachable):
    """A body ended before its time, or its connection did."""


class TooSlow(Unreachable):
    """A body comes, but so slowly that nobody waits for its end."""


class AskedToWait(Unreachable):
    """The Hub, or its storage, wants to be asked again later than anybody waits."""


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns the client's errors into what they mean for an adapter.

    Raises:
        AdapterProblem: `gated`, `disabled`, `not_found` or `no_such_file`.
        Unreachable: anything else.
    """
    try:
        yield
    except GatedRepoError as error:
        raise AdapterProblem("gated", f"{repo_id} is gated, and it does not let you in") from error
    except DisabledRepoError as error:
        raise AdapterProblem("disabled", f"the Hub has closed {repo_id}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise AdapterProblem("not_found", f"the Hub has no {repo_id} that you may see") from error
    except EntryNotFoundError as error:
        raise AdapterProblem(NO_SUCH_FILE, f"{repo_id} has no such file") from error
    except Unreachable:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(f"{repo_id} cannot be read from the Hub: {reason}") from error


def again_where_broken(read: Callable[[], Read]) -> Read:
    """Reads a short body, from the start again where it broke off."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Broken):
            return read()
    return read()
