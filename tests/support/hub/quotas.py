"""Rate limits as the Hub has them: so many requests of a kind in a fixed window."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from support.hub.messages import Answer, Request, error

BUCKETS = {"listing": "api", "info": "api", "tree": "api", "resolve": "resolvers"}


@dataclass(frozen=True)
class Quota:
    """How much is allowed.

    Args:
        limit: requests in a window.
        window_s: whole seconds.
    """

    limit: int
    window_s: int


@dataclass
class Bucket:
    """What is used of a quota in the window that began with its first request."""

    name: str
    quota: Quota
    now: Callable[[], float]
    used: int = 0
    started: float = field(default=-math.inf)

    def take(self) -> bool:
        """Counts a request; whether it was still within the quota."""
        if self.now() >= self.started + self.quota.window_s:
            self.started, self.used = self.now(), 0
        if self.used >= self.quota.limit:
            return False
        self.used += 1
        return True

    @property
    def headers(self) -> dict[str, str]:
        """What is left, until when, and of how much."""
        left = self.quota.limit - self.used
        reset = math.ceil(max(0.0, self.started + self.quota.window_s - self.now()))
        policy = f'"fixed window";"{self.name}";q={self.quota.limit};w={self.quota.window_s}'
        return {"RateLimit": f'"{self.name}";r={left};t={reset}', "RateLimit-Policy": policy}


class RateLimits:
    """The buckets of a Hub, by name: `api` and `resolvers`. The storage has none.

    Args:
        quotas: of each bucket; one that is left out has no limit.
        now: seconds, from whenever.
    """

    def __init__(
        self, quotas: Mapping[str, Quota], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._buckets = {name: Bucket(name, quota, now) for name, quota in quotas.items()}

    def apply(self, request: Request, answer: Answer) -> Answer:
        """The answer with the bucket's headers, or 429 where the bucket is empty."""
        bucket = self._buckets.get(BUCKETS.get(request.kind, ""))
        if bucket is None:
            return answer
        within = bucket.take()
        shown = answer if within else error(429, "We had to rate limit you.")
        return shown.with_headers(**bucket.headers)
