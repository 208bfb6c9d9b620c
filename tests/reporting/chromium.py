"""A page opened in headless Chromium, over its debugging pipe: no driver and no port needed."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
]
# The file descriptors that Chromium reads commands from and writes answers to.
COMMANDS, ANSWERS = 3, 4
FREE = 10
MISSING = "Chromium is not installed (Debian: apt-get install chromium)"


def find_chromium() -> str | None:
    """Its program, where it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """The one page of a browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands = commands
        self.answers = os.fdopen(answers, "rb")
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Asks the browser for something and waits for the answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def open(self, file: Path, width: int, scheme: str = "light") -> None:
        """Shows a file in a window of that width, and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not self._seen("Page.loadEventFired"):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages, errors and alerts since the file was opened."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        kinds += ("Page.javascriptDialogOpening",)
        return [json.dumps(event) for event in self.events if event.get("method") in kinds]

    def requested(self) -> set[str]:
        """The addresses that were asked for."""
        return {
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }

    def _seen(self, method: str) -> bool:
        return any(event.get("method") == method for event in self.events)

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium went away"
            text += byte
        return dict(json.loads(text))


@contextmanager
def chromium_page(profile: Path) -> Iterator[Page]:
    """A browser of its own with one page."""
    chromium = find_chromium()
    assert chromium
    theirs_in, ours_out = _high_pipe()
    ours_in, theirs_out = _high_pipe()

    def arrange() -> None:
        os.dup2(theirs_in, COMMANDS)
        os.dup2(theirs_out, ANSWERS)

    browser = subprocess.Popen(
        [chromium, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=arrange,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = Page(ours_out, ours_in)
    try:
        yield page
    finally:
        browser.terminate()
        browser.wait(30)
        os.close(ours_out)
        page.answers.close()


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are out of the way of those that Chromium uses."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FREE) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
