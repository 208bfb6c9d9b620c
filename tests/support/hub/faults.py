"""What goes wrong on the way, as data: which requests, what happens to them, how often."""

import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from support.hub.messages import Answer, Request, error

Action = Callable[[Answer], Answer]


@dataclass
class Fault:
    """One thing that goes wrong.

    Args:
        pattern: a regular expression that is searched for in `METHOD /path?query`.
        action: what happens to the answer.
        times: how many of the requests that match are hit; None for all.
        skip: how many that match are let through first.
        probability: of a hit, drawn for each request line and its repetition number, so that the
            order of concurrent requests does not change what is drawn.
        seed: of the draws.
    """

    pattern: str
    action: Action
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    seed: int = 0
    hits: int = field(default=0, init=False)
    seen: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def strikes(self, request: Request) -> bool:
        """Whether this request is hit; counts it."""
        if re.search(self.pattern, request.line) is None:
            return False
        self.seen[request.line] += 1
        spent = self.times is not None and self.hits >= self.times
        if spent or self.seen.total() <= self.skip or not self._drawn(request.line):
            return False
        self.hits += 1
        return True

    def _drawn(self, line: str) -> bool:
        draw = Random(f"{self.seed} {line} {self.seen[line]}").random()
        return draw < self.probability


def too_many_requests(
    wait_s: int, header: Literal["RateLimit", "Retry-After"] = "RateLimit"
) -> Action:
    """429, and when to come again in the Hub's own header or in the standard one."""
    value = f'"api";r=0;t={wait_s}' if header == "RateLimit" else str(wait_s)
    refused = error(429, "We had to rate limit you.")
    return lambda answer: replace(refused, headers={**refused.headers, header: value})


def server_error(status: int = 503) -> Action:
    """A 5xx without any of the headers that the Hub's own errors have."""
    return lambda answer: Answer(status, {"Content-Type": "text/html"}, b"<html>sorry</html>")


def truncated(sent: int) -> Action:
    """The connection is closed after so many bytes of the body, whose length was promised."""
    return lambda answer: replace(answer, sent=sent)


def slow(delay_s: float) -> Action:
    """The first byte is late."""
    return lambda answer: replace(answer, delay_s=delay_s)


def dripping(piece: int, pause_s: float) -> Action:
    """The body comes so many bytes at a time, with a pause behind each."""
    return lambda answer: replace(answer, piece=piece, pause_s=pause_s)


def held(until: threading.Event) -> Action:
    """Nothing is answered until this happens."""
    return lambda answer: replace(answer, until=until)


def hanging() -> Action:
    """Nothing is ever answered; the connection stays open until the server ends."""
    return lambda answer: replace(answer, never=True)


def tampered(at: int = -1) -> Action:
    """One byte of the body is another one; its size is the same."""

    def act(answer: Answer) -> Answer:
        if answer.status >= 300 or not answer.body:
            return answer
        body = bytearray(answer.body)
        body[at] ^= 0xFF
        return replace(answer, body=bytes(body))

    return act


def longer(extra: int) -> Action:
    """The body has more bytes than the file was said to have."""
    return lambda answer: replace(answer, body=answer.body + bytes(extra))


def shorter(missing: int) -> Action:
    """The body has fewer bytes than the file was said to have; its own length is not a lie."""
    return lambda answer: replace(answer, body=answer.body[: max(0, len(answer.body) - missing)])


def range_ignored() -> Action:
    """The whole file is sent where a range was asked for, as some proxies do."""

    def act(answer: Answer) -> Answer:
        if answer.whole is None:
            return answer
        hidden = {"Content-Range", "Accept-Ranges"}
        headers = {name: value for name, value in answer.headers.items() if name not in hidden}
        return replace(answer, status=200, headers=headers, body=answer.whole)

    return act


def lying_size(size: int) -> Action:
    """The redirect to the storage announces another size than the file has."""
    return lambda answer: answer.with_headers(X_Linked_Size=str(size))
