"""What goes over the wire: requests as they are logged, answers before they are written."""

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Origin = Literal["hub", "storage"]
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Request:
    """One request.

    Args:
        origin: the Hub itself, or the storage that it redirects to for large files.
        method: GET or HEAD.
        target: path and query as they were sent.
        headers: names in lower case.
        status: what it was answered with; 0 for one that was left hanging.
    """

    origin: Origin
    method: str
    target: str
    headers: Mapping[str, str]
    status: int = 0

    @property
    def line(self) -> str:
        """What faults are matched against, as in `GET /api/models?filter=peft`."""
        return f"{self.method} {self.target}"

    @property
    def path(self) -> str:
        """The path, still percent-encoded."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        """Each parameter with all its values."""
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    def parameter(self, name: str) -> str | None:
        """The first value of a parameter."""
        return self.query.get(name, [None])[0]

    @property
    def parts(self) -> list[str]:
        """The path's segments, decoded one by one, so that an encoded slash stays in its own."""
        return [unquote(part) for part in self.path.split("/")[1:]]

    @property
    def authorization(self) -> str | None:
        """The header of that name."""
        return self.headers.get("authorization")

    @property
    def token(self) -> str | None:
        """The bearer token that was sent."""
        kind, _, token = (self.authorization or "").partition(" ")
        return token if kind.lower() == "bearer" else None

    @property
    def range(self) -> str | None:
        """The header of that name."""
        return self.headers.get("range")

    @property
    def kind(self) -> str:
        """What was asked for: listing, info, tree, resolve, storage or other."""
        if self.origin == "storage":
            return "storage"
        match self.parts:
            case ["api", "models"]:
                return "listing"
            case ["api", "models", _, _, "tree", *_]:
                return "tree"
            case ["api", "models", _, _, *_]:
                return "info"
            case [_, _, "resolve", *_]:
                return "resolve"
        return "other"


@dataclass(frozen=True)
class Answer:
    """One answer. Faults change it before it is written.

    Args:
        status: the HTTP status.
        headers: without Content-Length, which is the body's.
        body: empty on the wire when the request was a HEAD.
        whole: the file that the body is a range of.
        sent: how many bytes of the body go out before the connection is closed; None for all.
        delay_s: seconds before the first byte.
        piece, pause_s: how many bytes of the body go out at once, and the seconds between; None
            for all of them.
        never: nothing is answered until the server ends.
        until: nothing is answered until this happens.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bytes | None = None
    sent: int | None = None
    delay_s: float = 0.0
    piece: int | None = None
    pause_s: float = 0.0
    never: bool = False
    until: threading.Event | None = None

    def with_headers(self, **headers: str) -> "Answer":
        """The same with more headers; underscores stand for hyphens."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return replace(self, headers={**self.headers, **more})


def as_json(content: Any, status: int = 200) -> Answer:
    """A JSON document."""
    headers = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, headers, json.dumps(content).encode())


def error(status: int, message: str, code: str | None = None) -> Answer:
    """An error as the Hub words it: in the body, and in the headers that its client reads."""
    answer = as_json({"error": message}, status).with_headers(X_Error_Message=message)
    return answer.with_headers(X_Error_Code=code) if code else answer


def file_answer(content: bytes, range_header: str | None) -> Answer:
    """A file, or the one range of it that was asked for: 200, 206, or 416 beyond its end."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    match = RANGE.fullmatch(range_header or "")
    if match is None or not any(match.groups()):
        return Answer(200, headers, content, whole=content)
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
        return error(416, "Range Not Satisfiable").with_headers(
            Content_Range=f"bytes */{len(content)}"
        )
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Answer(206, headers, content[start:end], whole=content)
